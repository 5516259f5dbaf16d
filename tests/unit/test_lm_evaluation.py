"""Evaluation inside a run changes nothing but its results; and the command that evaluates a checkpoint."""

import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader

from app.checkpoint import write_checkpoint
from app.commands.evaluate import evaluate as evaluate_command
from callbacks.evaluation import suites
from callbacks.evaluation.suites import Suite
from callbacks.evaluation.tasks import LoadedTasks, Source
from callbacks.lm_evaluation import LMEvaluation
from callbacks.safety import StopOnSignal
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.layers.transformer import Transformer
from modules.weights import Weights

pytest.importorskip("lm_eval")

TASK = """
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["Ann", "Bob", "tea", "王小明"]
doc_to_target: gold
num_fewshot: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
FAIL = TASK.replace("doc_to_target: gold", 'doc_to_target: "{{1 // (2 - gold)}}"')
MAX_STEPS = 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Who likes tea? Ann likes tea. Bob. 谁喜欢茶？王小明。"] * 4, 300)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks({}, folder)
    return folder


def write_tasks(world: dict[str, Any], folder: Path) -> None:
    rows = [{"q": f"Who likes tea {number}?", "gold": number % 4} for number in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = {"data_files": {"test": str(folder / "rows.jsonl")}}
    for name, body in {"tiny_choose": TASK, "tiny_fail": FAIL}.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\n"
        (folder / f"{name}.yaml").write_text(head + body, encoding="utf-8")


class Memory(Logger):
    """Keeps what is logged."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class Text(pl.LightningDataModule):
    """Random tokens in an order that torch's global randomness decides."""

    seq_len = 8
    consumed_samples = 40

    def __init__(self, tokenizer: Tokenizer, task_dir: Path | None) -> None:
        super().__init__()
        self.tokenizer, self.task_dir = tokenizer, task_dir
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, tokenizer.vocab_size, (40, 9), generator=generator)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=2, shuffle=True)


class Model(pl.LightningModule):
    """A network under dropout, so that a changed random state shows in the weights."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Transformer(
            ModelConfig(vocab_size=vocab_size, dim=16, num_layers=1, num_heads=2, max_seq_len=128)
        )
        self.losses: list[float] = []

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        assert self.network.training and torch.is_grad_enabled()
        hidden_BLD, _ = self.network(tokens[:, :-1])
        loss = F.cross_entropy(self.network.logits(F.dropout(hidden_BLD)).flatten(0, 1), tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    tokenizer: Tokenizer, task_dir: Path | None, folder: Path, *callbacks: pl.Callback, **options: Any
) -> tuple[Model, Memory]:
    model, memory = Model(tokenizer.vocab_size), Memory()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=MAX_STEPS,
        logger=memory,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    pl.seed_everything(3, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*num_workers.*")
        trainer.fit(model, datamodule=Text(tokenizer, task_dir))
    return model, memory


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "eval").iterdir())


def read(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "eval" / f"step-{step:08d}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_with_and_without_evaluation_is_bit_equal(
    tokenizer: Tokenizer, task_dir: Path, tmp_path: Path, accumulate: int
) -> None:
    callback = LMEvaluation(tasks=["tiny_choose"], every_n_steps=1, at_start=True)
    watched, _ = fit(tokenizer, task_dir, tmp_path, callback, accumulate_grad_batches=accumulate)
    plain, _ = fit(tokenizer, task_dir, tmp_path, accumulate_grad_batches=accumulate)
    assert watched.losses == plain.losses and len(plain.losses) == accumulate * MAX_STEPS
    for left, right in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(left, right)
    assert files(tmp_path) == [f"step-{step:08d}.json" for step in range(MAX_STEPS + 1)]


def test_results_reach_file_loggers_and_attribute(tokenizer: Tokenizer, task_dir: Path, tmp_path: Path) -> None:
    callback = LMEvaluation(tasks=["tiny_choose"], every_n_steps=3, limit=8)
    _, memory = fit(tokenizer, task_dir, tmp_path, callback)
    assert files(tmp_path) == ["step-00000003.json", "step-00000004.json"]  # every third, and the last
    record = read(tmp_path, 4)
    assert callback.latest == record
    assert record["step"] == 4 and record["suite"] == "tiny_choose" and record["limit"] == 8
    assert record["tokens"] == 40 * 8 and record["num_samples"] == {"tiny_choose": 8}
    assert record["results"]["tiny_choose"]["chance"] == 0.25 and record["versions"]["lm_eval"]
    logged = {"eval/tiny_choose", "perf/eval_s"}
    assert [(step, set(row)) for step, row in memory.rows] == [(3, logged), (4, logged)]
    assert memory.rows[1][1]["eval/tiny_choose"] == record["results"]["tiny_choose"]["acc"]


def test_inside_an_accumulation_nothing_is_evaluated(tokenizer: Tokenizer, task_dir: Path, tmp_path: Path) -> None:
    callback = LMEvaluation(tasks=["tiny_choose"], every_n_steps=2, at_end=False)
    seen: list[tuple[int, int]] = []
    real = callback.evaluate_now
    callback.evaluate_now = lambda trainer, module, *rest: (  # type: ignore[method-assign]
        seen.append((trainer.global_step, len(module.losses))),
        real(trainer, module, *rest),
    )[1]
    fit(tokenizer, task_dir, tmp_path, callback, accumulate_grad_batches=3)
    assert seen == [(2, 6), (4, 12)]


def test_a_failing_task_warns_and_training_goes_on(tokenizer: Tokenizer, task_dir: Path, tmp_path: Path) -> None:
    callback = LMEvaluation(tasks=["tiny_fail", "tiny_choose"], every_n_steps=2)
    with pytest.warns(UserWarning, match="evaluation of tiny_fail at step 2 failed.*ZeroDivisionError"):
        watched, _ = fit(tokenizer, task_dir, tmp_path, callback)
    plain, _ = fit(tokenizer, task_dir, tmp_path)
    assert watched.losses == plain.losses
    assert set(read(tmp_path, 4)["results"]) == {"tiny_choose"}


def test_a_disk_that_refuses_warns_too(
    tokenizer: Tokenizer, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("callbacks.evaluation.trainer_side.replace_file", refuse)
    callback = LMEvaluation(tasks=["tiny_choose"])
    with pytest.warns(UserWarning, match="step 4 failed.*no space left"):
        fit(tokenizer, task_dir, tmp_path, callback)
    assert callback.latest is not None and callback.latest["step"] == 4


def test_wrong_tasks_are_reported_before_training(
    tokenizer: Tokenizer, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_defaults, include_path: real(None, include_path, include_defaults=False),
    )
    with pytest.raises(InputError, match=r"'tiny_chose'.*did you mean tiny_choose"):
        fit(tokenizer, task_dir, tmp_path, LMEvaluation(tasks=["tiny_chose"]))
    with pytest.raises(InputError, match="'synthetic' asks about the embedded world, which Text does not hold"):
        fit(tokenizer, None, tmp_path, LMEvaluation(suite="synthetic"))


def test_default_is_the_suite_of_the_data(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other data than a world, and when nothing asks for it, there is no evaluation."""
    asked: list[tuple[str, Path | None]] = []

    def load(suite: Suite, source: Source) -> LoadedTasks:
        asked.append((suite.name, source.folder))
        return LoadedTasks(suite, {})

    monkeypatch.setattr("callbacks.lm_evaluation.load_tasks", load)
    LMEvaluation().prepare(Text(tokenizer, None))
    LMEvaluation(suite="synthetic", at_end=False, at_transitions=False).prepare(Text(tokenizer, None))
    assert asked == []
    LMEvaluation().prepare(Text(tokenizer, Path("/world")))
    assert asked == [("synthetic", Path("/world"))]


def test_wrong_arguments_are_input_errors() -> None:
    with pytest.raises(InputError, match="both given"):
        LMEvaluation(suite="synthetic", tasks=["arc_easy"])
    with pytest.raises(InputError, match="every_n_steps=0"):
        LMEvaluation(every_n_steps=0)
    with pytest.raises(InputError, match="limit=-1"):
        LMEvaluation(limit=-1)
    with pytest.raises(InputError, match="'sinthetic'"):
        LMEvaluation(suite="sinthetic")


def test_without_lm_eval_a_warning_and_no_evaluation(
    tokenizer: Tokenizer, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    callback = LMEvaluation(tasks=["tiny_choose"], every_n_steps=1, at_start=True)
    with pytest.warns(UserWarning, match="evaluation is off") as caught:
        model, _ = fit(tokenizer, task_dir, tmp_path, callback)
    assert sum("evaluation is off" in str(warning.message) for warning in caught) == 1
    assert len(model.losses) == MAX_STEPS and not (tmp_path / "eval").exists()


class Stop(pl.Callback):
    """Ends training early, as a signal does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        trainer.should_stop = trainer.global_step == 2


def test_a_stopped_run_does_not_wait_for_an_evaluation(tokenizer: Tokenizer, task_dir: Path, tmp_path: Path) -> None:
    model, _ = fit(tokenizer, task_dir, tmp_path, LMEvaluation(tasks=["tiny_choose"]), Stop())
    assert len(model.losses) == 2 and not (tmp_path / "eval").exists()


class Signal(pl.Callback):
    """Tells the run to stop behind its second step, in front of the evaluation."""

    def __init__(self, stopper: StopOnSignal) -> None:
        self.stopper = stopper

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.global_step == 2:
            self.stopper.received = signal.SIGTERM


def test_an_evaluation_is_given_up_for_a_signal(tokenizer: Tokenizer, task_dir: Path, tmp_path: Path) -> None:
    stopper = StopOnSignal()
    callback = LMEvaluation(tasks=["tiny_choose"], every_n_steps=2)
    with pytest.warns(UserWarning, match="evaluation at step 2 was given up for a signal to stop"):
        model, memory = fit(tokenizer, task_dir, tmp_path, Signal(stopper), callback, stopper)
    assert len(model.losses) == 2 and memory.rows == [] and callback.latest is None


class Grow(pl.Callback):
    """Puts another network in place before one step and says so, as growth does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.network.embedding.weight.mul_(-3)
            for callback in trainer.callbacks:
                if isinstance(callback, LMEvaluation):
                    callback.on_transition(trainer, pl_module, {"id": "grow-1", "step": self.step})
                    callback.on_transition(trainer, pl_module, {"id": "grow-1", "step": self.step})  # as after a resume


def test_transition_keeps_what_was_found_before_it(tokenizer: Tokenizer, task_dir: Path, tmp_path: Path) -> None:
    fit(tokenizer, task_dir, tmp_path / "on", LMEvaluation(tasks=["tiny_choose"], every_n_steps=2), Grow(2))
    fit(
        tokenizer,
        task_dir,
        tmp_path / "off",
        LMEvaluation(tasks=["tiny_choose"], every_n_steps=2, at_transitions=False),
        Grow(2),
    )
    after, before = read(tmp_path / "on", 2), read(tmp_path / "off", 2)
    assert after["transition"] == "grow-1" and "transition" not in before
    assert after["before_transition"]["results"] == before["results"]
    assert "before_transition" not in after["before_transition"]


def test_state_survives_a_safe_load(tmp_path: Path) -> None:
    callback = LMEvaluation(tasks=["tiny_choose"])
    callback.latest = {"step": 3, "results": {"tiny_choose": {"acc": 0.5}}, "limit": None}
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    other = LMEvaluation(tasks=["tiny_choose"])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.latest == callback.latest


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a run on a world whose tasks are the tiny ones."""
    monkeypatch.setattr(
        suites, "load_suite", lambda name: Suite("synthetic", ("tiny_choose",), description="x", embedded=True)
    )
    monkeypatch.setattr("datamodules.world.tasks.write_world_tasks", write_tasks)
    network = Model(tokenizer.vocab_size).network
    data = {"class": "SyntheticWorld", "world": {"seed": 0}}
    path = tmp_path / "step-00000003"
    metadata = {"architecture": network.config.to_dict(), "step": 3, "tokens": 24, "data": data}
    weights = Weights.of(network.state_dict())
    write_checkpoint(path, weights=weights, metadata=metadata, tokenizer_json=tokenizer.to_json())
    return path


def test_command_prints_a_table_and_writes_results_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    evaluate_command(checkpoint, limit=8, output=output, device="cpu")
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["step"] == 3 and record["tokens"] == 24 and record["suite"] == "synthetic" and record["limit"] == 8
    accuracy = record["results"]["tiny_choose"]["acc"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "tiny_choose" in line]
    assert all(cell in line for cell in (f"{accuracy:.4f}", "0.2500", " 8 ")) and "acc" in line
    with pytest.raises(InputError, match=r"results\.json exists"):
        evaluate_command(checkpoint, output=output, device="cpu")
    with pytest.raises(InputError, match="does not exist"):
        evaluate_command(checkpoint, output=tmp_path / "nowhere" / "results.json", device="cpu")
    assert json.loads(output.read_text(encoding="utf-8")) == record


def test_command_agrees_with_the_callback(
    checkpoint: Path, tokenizer: Tokenizer, task_dir: Path, tmp_path: Path
) -> None:
    evaluate_command(checkpoint, output=tmp_path / "results.json", device="cpu")
    fit(tokenizer, task_dir, tmp_path, LMEvaluation(tasks=["tiny_choose"], at_start=True, at_end=False))
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    for key in ("results", "versions", "num_fewshot"):
        assert found[key] == read(tmp_path, 0)[key]


def test_command_needs_a_world_for_its_tasks(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    record = json.loads(manifest.read_text(encoding="utf-8"))
    record["metadata"]["data"]["world"] = None
    manifest.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match="not trained on one"):
        evaluate_command(checkpoint, device="cpu")


def test_command_says_when_lm_eval_is_absent(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "callbacks.evaluation.harness", raising=False)
    with pytest.raises(InputError, match="pip install lm-eval"):
        evaluate_command(checkpoint, device="cpu")


def test_command_compares_with_a_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    evaluate_command(checkpoint, limit=8, output=output, device="cpu")
    capsys.readouterr()
    evaluate_command(checkpoint, limit=8, compare=output, device="cpu")
    lines = [line for line in capsys.readouterr().out.splitlines() if "tiny_choose" in line]
    assert len(lines) == 2 and "+0.0000" in lines[1] and "0.0000" in lines[1] and "yes" in lines[1]
    evaluate_command(checkpoint, limit=6, compare=output, device="cpu")
    printed = capsys.readouterr().out
    assert "other questions" in printed and " no " in printed


def test_command_ends_with_1_where_a_task_failed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = Suite("synthetic", ("tiny_fail", "tiny_choose"), embedded=True)
    monkeypatch.setattr(suites, "load_suite", lambda name: suite)
    output = tmp_path / "results.json"
    with pytest.raises(SystemExit) as ended:
        evaluate_command(checkpoint, output=output, device="cpu")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert "tiny_fail failed (ZeroDivisionError" in printed.err and "tiny_choose" in printed.out
    assert set(json.loads(output.read_text(encoding="utf-8"))["results"]) == {"tiny_choose"}


class Tables(Memory):
    """A logger that has tables, as that of W&B."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[tuple[int | None, list[str], list[list[Any]]]] = []

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        assert key == "eval/examples"
        self.tables.append((step, columns, data))


def test_examples_reach_loggers_with_tables_and_metrics_the_trainer(
    tokenizer: Tokenizer, task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Memory", Tables)
    callback = LMEvaluation(tasks=["tiny_choose"], examples=2)
    seen: list[dict[str, Tensor]] = []

    class Look(pl.Callback):
        def on_evaluation(self, trainer: pl.Trainer, module: Any, metrics: Any, transition: Any) -> None:
            seen.append({name: trainer.callback_metrics[name] for name in metrics})

    _, memory = fit(tokenizer, task_dir, tmp_path, callback, Look())
    assert isinstance(memory, Tables)
    ((step, columns, rows),) = memory.tables
    assert step == 4 and columns == ["step", "task", "question", "answer", "expected", "right"] and len(rows) == 2
    assert (
        rows[0][1] == "tiny_choose" and rows[0][3] in {" Ann", " Bob", " tea", " 王小明"} and rows[0][5] in (0.0, 1.0)
    )
    assert [set(metrics) for metrics in seen] == [{"eval/tiny_choose"}]
