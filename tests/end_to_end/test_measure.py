"""`growmoe measure`: step times of every stage, and where they go; and accelerator time in a run."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from app.cli import main
from callbacks import step_clock
from callbacks.checkpointing import Checkpointing
from callbacks.step_parts import PARTS, PartClock, watched
from modules.config import ModelConfig
from modules.functional.flops import count_parameters, training_flops_per_token
from modules.jsonl import read_jsonl
from modules.language_model import LanguageModel
from modules.layers.transformer import Transformer
from modules.moe_config import MoEConfig
from tests.end_to_end.runs import fit, metrics, settings, write


def measure(config: dict[str, Any], path: Path, *arguments: str) -> dict[str, Any]:
    """Run `growmoe measure`; returns the record."""
    output = path / "measured.json"
    main(["measure", "--config", str(write(config, path / "measure.yaml")), "--output", str(output), *arguments])
    record: dict[str, Any] = json.loads(output.read_text())
    return record


def test_every_stage_is_measured(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path / "run", world)
    config["throughput"] = {"peak_flops": 1e12}
    words = ["--measure.warmup", "1", "--measure.steps", "4", "--measure.parts", "2"]
    record = measure(config, tmp_path, *words)
    assert not (tmp_path / "run").exists(), "nothing is saved but the record"
    assert [stage["trigger"] for stage in record["stages"]] == [None, {"at_step": 6}, {"at_step": 12}]
    assert [stage["architecture"]["dim"] for stage in record["stages"]] == [16, 24, 24]
    for stage in record["stages"]:
        architecture = ModelConfig.from_dict(stage["architecture"])
        flops = training_flops_per_token(architecture, 32)
        assert len(stage["steps_s"]) == 4 and stage["wait_s"] < stage["step_s"]
        assert stage["flops_per_token"] == flops
        assert stage["parameters"]["active"] == count_parameters(architecture).active
        assert stage["tokens_per_s"] == pytest.approx(4 * 32 / stage["step_s"])
        assert stage["mfu"] == pytest.approx(flops * 4 * 32 / stage["step_s"] / 1e12)
        assert sum(stage["parts_s"].values()) == pytest.approx(stage["step_s"], rel=1e-6)
        assert set(stage["parts_s"]) <= {"input", *PARTS} and "communication" not in stage["parts_s"]
    dense, grown, mixture = (stage["parts_s"] for stage in record["stages"])
    for parts in (dense, grown):
        assert all(parts[name] > 0 for name in ("attention", "feed-forward", "loss", "optimizer", "rest"))
        assert "routing" not in parts
    assert mixture["routing"] > 0 and mixture["expert products"] > 0 and mixture["feed-forward"] > 0
    assert [stage["transition_s"] > 0 for stage in record["stages"]] == [False, True, True]
    assert record["machine"]["devices"] == 1 and record["peak"] == {"flops": 1e12, "source": "given"}
    assert "where it goes" in capsys.readouterr().out


def test_a_recipe_and_a_length_are_not_needed(tmp_path: Path, world: Path) -> None:
    config = settings(tmp_path / "run", world, max_steps=-1)
    del config["growth"]
    record = measure(config, tmp_path, "--measure.warmup", "0", "--measure.steps", "2", "--measure.parts", "0")
    (stage,) = record["stages"]
    assert len(stage["steps_s"]) == 2 and stage["parts_s"] == {}
    assert record["peak"]["source"] == "measured product in float32"


def test_micro_batches_make_one_step(tmp_path: Path, world: Path) -> None:
    config = settings(tmp_path / "run", world, accumulate_grad_batches=3)
    del config["growth"]
    record = measure(config, tmp_path, "--measure.warmup", "1", "--measure.steps", "3", "--measure.parts", "1")
    assert record["tokens_per_step"] == 3 * 4 * 32 and record["samples_per_step"] == 12
    assert len(record["stages"][0]["steps_s"]) == 3
    assert record["stages"][0]["parts_s"]["optimizer"] > 0


def test_a_run_that_starts_with_another_model_is_measured_with_it(tmp_path: Path, world: Path) -> None:
    first = settings(tmp_path / "first", world, max_steps=3)
    first["growth"] = {"stages": []}
    first["model"]["init_args"]["architecture"] = {"dim": 24, "num_layers": 3, "num_heads": 3}
    run_dir = fit(first)
    config = settings(tmp_path / "run", world)
    del config["growth"], config["model"]["init_args"]["architecture"]
    config["model"]["init_args"]["start_from"] = str(run_dir / "checkpoints" / "step-00000003")
    record = measure(config, tmp_path, "--measure.warmup", "0", "--measure.steps", "2", "--measure.parts", "0")
    assert (record["stages"][0]["architecture"]["dim"], record["stages"][0]["architecture"]["num_layers"]) == (24, 3)


def test_measuring_changes_nothing_of_the_model(tmp_path: Path, world: Path) -> None:
    """Clocked functions are the same functions, and give themselves back."""
    moe = MoEConfig(num_experts=4, top_k=2, num_shared_experts=1, every=2)
    network = Transformer(ModelConfig(vocab_size=50, dim=16, num_layers=2, num_heads=2, moe=moe))
    tokens, found = torch.randint(50, (2, 9)), []
    for is_watched in (False, True):
        clock = PartClock(torch.device("cpu"))
        network.zero_grad()
        if is_watched:
            with watched(network, clock, is_alone=True):
                clock.start()
                _step(network, tokens)
                clock.switch("rest")
        else:
            _step(network, tokens)
        found.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert "forward" not in vars(network.blocks[0].attention) and "cross_entropy" not in vars(network)
    assert all(clock.seconds[part] > 0 for part in ("attention", "routing", "expert products", "feed-forward", "loss"))


def _step(network: Any, tokens: Any) -> None:
    hidden, stats = network(tokens[:, :-1])
    total, _ = network.cross_entropy(hidden.flatten(0, 1), tokens[:, 1:].flatten())
    (total + sum(each.probabilities_GE.sum() for each in stats)).backward()


# -- accelerator time in a run -----------------------------------------------------------------------------------------


class Clock:
    """In the place of `time`, for accelerator time alone: it stands still but for what is said to take time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now

    def taking(self, function: Any, seconds: Callable[..., float]) -> Any:
        """The same function, which takes so long."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds(*args, **kwargs)
            return function(*args, **kwargs)

        return timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A step takes half a second for each layer; what is done between steps takes much longer."""
    clock = Clock()
    monkeypatch.setattr(step_clock, "time", clock)
    step = clock.taking(LanguageModel.training_step, lambda module, *args: 0.5 * module.architecture.num_layers)
    monkeypatch.setattr(LanguageModel, "training_step", step)
    monkeypatch.setattr(LanguageModel, "validation_step", clock.taking(LanguageModel.validation_step, lambda *args: 10))
    monkeypatch.setattr(Checkpointing, "_save", clock.taking(Checkpointing._save, lambda *args: 100))
    return clock


def test_time_between_steps_does_not_count(tmp_path: Path, world: Path, clock: Clock) -> None:
    """Validation, checkpoints and what callbacks do between steps are left out, and a resumed run goes on counting."""
    config = settings(tmp_path / "run", world)
    run_dir = fit(config)
    records = [json.loads(line) for line in (run_dir / "transitions.jsonl").read_text().splitlines()]
    assert clock.now > 500, "much was done between steps"
    transitions = sum(record["seconds"] for record in records)
    spent = {step: float(row["perf/accelerator_s"]) for step, row in metrics(run_dir).items() if row.get("train/loss")}
    assert spent[5] == pytest.approx(5 * 1.0)
    assert spent[16] == pytest.approx(6 * 1.0 + 10 * 1.5 + transitions)
    assert {float(metrics(run_dir)[step]["perf/step_ms"]) for step in (5, 16)} == {1000.0, 1500.0}
    config["trainer"]["max_steps"] = 18
    fit(config, "--ckpt_path", "auto")
    assert float(metrics(run_dir)[18]["perf/accelerator_s"]) == pytest.approx(spent[16] + 3.0)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_a_run_is_cut_by_accelerator_time_and_ends_on_its_decay(
    kind: str, tmp_path: Path, world: Path, clock: Clock
) -> None:
    config = settings(tmp_path / "run", world, max_steps=100, val_check_interval=1000)
    config["growth"] = {"stages": []}
    config["model"]["init_args"]["schedule"]["kind"] = kind
    config["budget"] = {"mode": "step_time", "amount": 40.0}
    run_dir = fit(config)
    rows = metrics(run_dir)
    assert max(rows) == 40 and float(rows[40]["perf/accelerator_s"]) == pytest.approx(40.0)
    assert float(rows[40]["train/lr"]) == pytest.approx(0.01 * 0.1), "it ends on its decay"
    assert rows[40].get("val/loss") and (run_dir / "checkpoints" / "step-00000040").is_dir()
    rates = [float(rows[step]["train/lr"]) for step in range(3, 41)]
    assert max(earlier - later for earlier, later in pairwise(rates)) < 0.0015, "without a jump"
    fit(config, "--ckpt_path", "auto")
    assert max(metrics(run_dir)) == 40, "a run at its end stays there"


def test_growth_follows_the_share_of_a_budget_in_time(tmp_path: Path, world: Path, clock: Clock) -> None:
    """A deeper model is slower: the run is cut further when it grows, and ends in time."""
    config = settings(tmp_path / "run", world, max_steps=100, val_check_interval=1000)
    config["growth"] = {"stages": [{"at_fraction": 0.5, "target": {"num_layers": 4}}]}
    config["budget"] = {"mode": "step_time", "amount": 60.0}
    run_dir = fit(config)
    rows, (record,) = metrics(run_dir), read_jsonl(run_dir / "transitions.jsonl")
    assert 55 < float(rows[max(rows)]["perf/accelerator_s"]) <= 62.0
    assert float(rows[max(rows)]["train/lr"]) == pytest.approx(0.01 * 0.1)
    assert record["step"] / max(rows) == pytest.approx(0.5, abs=0.15), "of the steps, as far as they could be foreseen"


def test_a_cut_run_resumes_at_its_pace(tmp_path: Path, world: Path, clock: Clock) -> None:
    config = settings(tmp_path / "whole", world, max_steps=100, val_check_interval=1000)
    config["growth"] = {"stages": []}
    config["budget"] = {"mode": "step_time", "amount": 30.0}
    whole = metrics(fit(config))
    config["trainer"]["default_root_dir"] = str(tmp_path / "part")
    config["trainer"]["max_steps"] = 100
    stopped = {**config, "trainer": {**config["trainer"], "callbacks": [{"class_path": f"{__name__}.StopAt"}]}}
    fit(stopped)
    assert max(metrics(tmp_path / "part")) == 12
    fit(config, "--ckpt_path", "auto")
    part = metrics(tmp_path / "part")
    assert max(part) == max(whole) == 30
    for step in whole:
        for name in ("train/loss", "train/lr"):
            assert part[step].get(name) == whole[step].get(name), (step, name)


def test_a_run_that_has_ended_in_time_cannot_be_prolonged(
    tmp_path: Path, world: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path / "run", world, max_steps=100, val_check_interval=1000)
    config["growth"] = {"stages": []}
    config["budget"] = {"mode": "step_time", "amount": 20.0}
    fit(config)
    config["budget"]["amount"] = 40.0
    with pytest.raises(SystemExit) as end:
        fit(config, "--ckpt_path", "auto")
    assert end.value.code == 2
    assert "budget.amount=40 cannot prolong a run that ended on its decay after 20 steps" in capsys.readouterr().err


def test_what_a_cut_run_will_not_come_to_is_told(tmp_path: Path, world: Path, clock: Clock) -> None:
    config = settings(tmp_path / "run", world, max_steps=100, val_check_interval=1000, log_every_n_steps=50)
    config["growth"] = {"stages": [{"at_step": 80, "target": {"num_layers": 3}}]}
    config["model"]["init_args"]["schedule"]["warmup_steps"] = 30
    config["budget"] = {"mode": "step_time", "amount": 25.0}
    with pytest.warns(
        UserWarning, match=r"ends the run at step 2[45], before the (end of the warm-up|growth stage)"
    ) as told:
        run_dir = fit(config)
    texts = "".join(str(warning.message) for warning in told)
    assert "the growth stage at_step=80" in texts and "the end of the warm-up (step 30)" in texts
    assert max(metrics(run_dir)) in (24, 25), "time is looked at early, however seldom steps are logged"


class StopAt(pl.Callback):
    """Stops a run after twelve steps."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """As a signal would."""
        if trainer.global_step == 12:
            trainer.should_stop = True
            trainer.limit_val_batches = 0


def test_a_run_within_its_time_is_the_run_without(tmp_path: Path, world: Path) -> None:
    plain = settings(tmp_path / "plain", world)
    timed = settings(tmp_path / "timed", world)
    timed["budget"] = {"mode": "step_time", "amount": 3600.0}
    rows = [metrics(fit(config)) for config in (plain, timed)]
    for step, row in rows[0].items():
        for name in ("train/loss", "train/lr", "val/loss"):
            assert row.get(name) == rows[1][step].get(name)


@pytest.mark.parametrize(
    ("mode", "amount", "steps"), [("tokens", 16 * 128 + 5, 16), ("own_chinchilla", 0.2, None), ("flops", 2e8, None)]
)
def test_a_budget_sets_the_length(mode: str, amount: float, steps: int | None, tmp_path: Path, world: Path) -> None:
    config = settings(tmp_path / "run", world, max_steps=-1)
    config["growth"] = {"stages": [{"at_fraction": 0.5, "target": {"num_layers": 3}}]}
    config["budget"] = {"mode": mode, "amount": amount}
    rows = metrics(fit(config))
    last = max(rows)
    assert last == steps or (steps is None and last > 4)
    assert float(rows[last]["train/lr"]) == pytest.approx(0.01 * 0.1, rel=1e-6)
