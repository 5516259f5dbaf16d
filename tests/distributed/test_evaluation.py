"""Evaluation by several processes: answers are those of one, whatever they share out, and nobody waits for ever."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from app.checkpoint import verify
from app.checkpoint_folder import list_checkpoints
from app.strategies.layout import Layout
from datamodules.tokenizer import Tokenizer, train_tokenizer
from modules.config import ModelConfig
from modules.errors import InputError
from modules.moe_config import MoEConfig
from modules.world import ONE_PROCESS, World
from tests.distributed.ranks import command, together
from tests.distributed.training import Case, module_in, world_in
from tests.end_to_end import runs

pytest.importorskip("lm_eval")

TEXTS = ["Who lives in the red house? Ann. Bob lives by the lake, and Ann likes tea.", "谁住在红房子里？王小明。"]
ONES = [Layout(1, 2), Layout(1, 2, ep=2), Layout(2, 1), Layout(1, 1, tp=2)]
TWOS = [Layout(1, 4, ep=2), Layout(2, 2, ep=2), Layout(1, 2, ep=2, tp=2)]
SHARED = "Ann lives in the red house by the lake. Bob likes tea. " * 2
PAIRS = [
    *[(f"{SHARED}Question {number}: who likes tea?", f" {name}") for number in range(5) for name in ("Ann", "Bob")],
    *[(f"谁住在红房子里？{'王小明。' * number}", "王小明住在红房子里") for number in range(4)],
    ("", "Ann likes tea"),
    ("tea", ""),
]


def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, 320)


def case() -> Case:
    moe = MoEConfig(num_experts=4, top_k=2, every=2)
    size = -(-tokenizer().vocab_size // 4) * 4  # so that two processes can share words out
    return Case(ModelConfig(vocab_size=size, dim=16, num_layers=3, num_heads=4, max_seq_len=128, init_std=0.4, moe=moe))


def answer(world: World, told: Any = lambda: False, begin: Any = lambda: None) -> list[Any]:
    """Log-likelihoods, whole texts and generated ones; in batches so small that some processes have none."""
    from lm_eval.api.instance import Instance

    from callbacks.evaluation.company import Company
    from callbacks.evaluation.model import HarnessLM
    from callbacks.evaluation.text_side import TextSide

    network: Any = module_in(world, case()).network
    company = Company(network.eval(), world, told)
    model = HarnessLM(network, TextSide(tokenizer()), max_batch_tokens=150, company=company)

    def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, argument, 0, ("task", number, 1)) for number, argument in enumerate(arguments)]

    begin()
    settings = {"until": ["Bob"], "max_gen_toks": 9}
    prompts = [(text[:length], settings) for text in TEXTS for length in (4, 9, 11)]
    with torch.no_grad():
        found = [
            model.loglikelihood(ask("loglikelihood", *PAIRS)),
            model.loglikelihood_rolling(ask("loglikelihood_rolling", (TEXTS[0] * 6,))),
            model.generate_until(ask("generate_until", *prompts)),
        ]
    world.settle(network)
    return found


def answer_in(layouts: list[Layout], folder: Path) -> None:
    """Every process notes its answers."""
    dist.init_process_group("gloo")
    found = {str(layout): answer(world_in(layout)) for layout in layouts}
    (folder / f"answers-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize("layouts", [ONES, TWOS], ids=["two processes", "four processes"])
def test_answers_are_those_of_one_process(layouts: list[Layout], tmp_path: Path) -> None:
    world_size = layouts[0].world_size
    together(world_size, tmp_path, answer_in, layouts, tmp_path)
    likelihoods, rolling, texts = answer(ONE_PROCESS)
    assert len(set(texts)) > 3 and len({score for score, _ in likelihoods}) > 12
    for rank in range(world_size):
        found = json.loads((tmp_path / f"answers-{rank}.json").read_text())
        assert len(found) == len(layouts)
        for layout, (its_likelihoods, its_rolling, its_texts) in found.items():
            for (score, greedy), (its_score, its_greedy) in zip(likelihoods, its_likelihoods, strict=True):
                assert its_score == pytest.approx(score, abs=1e-9) and its_greedy == greedy, layout
            assert its_rolling == pytest.approx(rolling, abs=1e-9) and its_texts == texts, layout


def fail_alone(folder: Path) -> None:
    """The second process fails before its first forward pass, and once behind its last one."""
    from callbacks.evaluation.company import Company, PeerFailed

    dist.init_process_group("gloo")
    world, rank = world_in(Layout(1, 2, ep=2)), dist.get_rank()

    def fail() -> None:
        if rank == 1:
            raise InputError("no")

    try:
        answer(world, begin=fail)
        outcome = "nothing"
    except PeerFailed:
        outcome = "peer"
    except InputError:
        Company(module_in(world, case()).network, world).tell_failure()
        outcome = "own"
    after = answer(world)  # they go on together
    (folder / f"outcome-{rank}.json").write_text(json.dumps([outcome, len(after)]))
    dist.destroy_process_group()


def test_a_process_that_fails_alone_does_not_keep_the_other_waiting(tmp_path: Path) -> None:
    together(2, tmp_path, fail_alone, tmp_path)
    assert [json.loads((tmp_path / f"outcome-{rank}.json").read_text()) for rank in (0, 1)] == [["peer", 3], ["own", 3]]


def stop_one(folder: Path) -> None:
    """The second process is told to stop behind its third pass."""
    from callbacks.evaluation.company import Stopped

    dist.init_process_group("gloo")
    world, rank = world_in(Layout(1, 2)), dist.get_rank()
    asked: list[None] = []

    def told() -> bool:
        asked.append(None)
        return rank == 1 and len(asked) > 3

    with pytest.raises(Stopped):
        answer(world, told)
    (folder / f"asked-{rank}").write_text(str(len(asked)))
    dist.destroy_process_group()


def test_all_give_up_where_one_was_told_to_stop(tmp_path: Path) -> None:
    together(2, tmp_path, stop_one, tmp_path)
    assert [(tmp_path / f"asked-{rank}").read_text() for rank in (0, 1)] == ["4", "4"]


def fail_in_a_task(folder: Path, tasks: Path) -> None:
    """A task that only the first process cannot finish; both leave it out, and have the other one's results."""
    from callbacks.evaluation.harness import Harness
    from callbacks.evaluation.suites import Suite
    from callbacks.evaluation.tasks import Source, load_tasks
    from callbacks.evaluation.text_side import TextSide

    dist.init_process_group("gloo")
    world, rank = world_in(Layout(1, 2)), dist.get_rank()
    network: Any = module_in(world, case()).network
    loaded = load_tasks(Suite("x", ("bad", "good")), Source(tasks))
    if rank == 0:
        task = loaded.by_name["bad"]["tasks"]["bad"]
        task.process_results = partial(_refuse, task)
    failed: list[str] = []
    harness = Harness(loaded, TextSide(tokenizer()))
    outcome = harness.evaluate(network, world, on_failure=lambda name, error: failed.append(type(error).__name__))
    (folder / f"record-{rank}.json").write_text(json.dumps([outcome.record(), failed]))
    dist.destroy_process_group()


def _refuse(*arguments: Any) -> None:
    raise ValueError("not today")


def test_a_task_that_fails_on_one_process_is_left_out_on_all(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"q": f"Who likes tea {number}?", "gold": number % 2} for number in range(9)]
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("bad", "good"):
        head = {"task": name, "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
        body = {"doc_to_text": "{{q}}", "doc_to_choice": ["Ann", "Bob"], "doc_to_target": "gold"}
        data = {"dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}}}
        (tasks / f"{name}.yaml").write_text(json.dumps(head | body | data))
    together(2, tmp_path, fail_in_a_task, tmp_path, tasks)
    (first, mine), (second, theirs) = (json.loads((tmp_path / f"record-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and set(first["results"]) == {"good"}
    assert (mine, theirs) == (["ValueError"], ["PeerFailed"])


@pytest.mark.parametrize("metric", ["eval/synthetic_facts_en", "val/bpb_en"])
def test_the_best_checkpoint_while_others_are_being_written(metric: str, world: Path, tmp_path: Path) -> None:
    """Evaluations, validations and checkpoints at the same steps; each save takes longer than a step."""
    config = runs.settings(tmp_path / "run", world, max_steps=8, val_check_interval=2)
    config["trainer"] |= {"devices": 2, "strategy": {"class_path": "app.strategies.ExpertParallelStrategy"}}
    config["data"]["init_args"]["batch_size"] = 2
    config["growth"]["stages"] = []
    config["evaluation"] = {"every_n_steps": 2, "limit": 8}
    config["checkpoint"] = {"every_n_steps": 2, "keep_last": 2}
    config["monitor"] = {"metric": metric, "patience": 9}
    path = runs.write(config, tmp_path / "config.yaml")
    together(2, tmp_path / "ranks", slow_saves, ["fit", "--config", str(path)])
    folder = tmp_path / "run" / "checkpoints"
    lines = [json.loads(line) for line in (tmp_path / "run" / "monitor.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert (folder / "best").resolve().name == lines[-1]["standing"]["name"]
    verify(folder / "best")
    assert "step-00000008" in [path.name for path in list_checkpoints(folder)]


def slow_saves(words: list[str]) -> None:
    """A verb of growmoe whose checkpoints take their time."""
    from app.strategies import saving

    complete = saving.PartSaver._complete

    def slow(self: Any, *arguments: Any, **named: Any) -> Any:
        time.sleep(0.3)
        return complete(self, *arguments, **named)

    saving.PartSaver._complete = slow  # type: ignore[method-assign]
    command(words)


def disagree(folder: Path) -> None:
    """Processes that have loaded different tasks find out before they wait for each other."""
    from callbacks.evaluation.company import Company, Disagreement

    dist.init_process_group("gloo")
    world, rank = world_in(Layout(1, 2)), dist.get_rank()
    company = Company(module_in(world, case()).network, world)
    company.agree(7)
    with pytest.raises(Disagreement, match="other tasks or data"):
        company.agree(rank)
    (folder / f"done-{rank}").touch()
    dist.destroy_process_group()


def test_processes_with_different_tasks_find_out(tmp_path: Path) -> None:
    together(2, tmp_path, disagree, tmp_path)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()
