"""Runs that are evaluated and validated: figures, the best checkpoint, the end of a run that ceases to improve."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import verify
from app.checkpoint_folder import list_checkpoints
from app.cli import main
from callbacks.monitor import Monitor
from modules.errors import InputError
from tests.end_to_end import runs

FACTS = "eval/synthetic_facts_en"


def settings(run_dir: Path, world: Path, **monitor: Any) -> dict[str, Any]:
    """Twelve steps of a dense model, validated and evaluated behind every second one."""
    config = runs.settings(run_dir, world, max_steps=12, val_check_interval=2)
    config["growth"]["stages"] = []
    config["evaluation"] = {"every_n_steps": 2, "at_end": False, "limit": 40}
    config["checkpoint"] = {"every_n_steps": 100, "keep_last": 2}
    return config | {"monitor": monitor}


def best_of(run_dir: Path, metric: str, better: Any) -> int:
    """The step whose value of a metric is the best, the first of equal ones."""
    values = {step: float(row[metric]) for step, row in runs.metrics(run_dir).items() if row.get(metric)}
    return better(values, key=lambda step: (values[step], -step if better is max else step))


def test_the_best_checkpoint_is_kept_and_named(world: Path, tmp_path: Path) -> None:
    run_dir = runs.fit(settings(tmp_path / "run", world, metric=FACTS))
    folder = run_dir / "checkpoints"
    best = best_of(run_dir, FACTS, max)
    assert (folder / "best").resolve().name == f"step-{best:08d}"
    verify(folder / "best")
    kept = [path.name for path in list_checkpoints(folder)]
    assert "step-00000012" in kept and len(kept) <= 4 and f"step-{best:08d}" in kept
    main(["generate", str(folder / "best"), "x", "--max_new_tokens", "1", "--device", "cpu"])


def test_lower_is_better_for_losses_and_a_transition_counts(world: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", world, metric="val/bpb_zh")
    config["growth"]["stages"] = [{"at_step": 5, "target": {"num_layers": 3}}]
    run_dir = runs.fit(config)
    best = best_of(run_dir, "val/bpb_zh", min)
    assert (run_dir / "checkpoints" / "best").resolve().name == f"step-{best:08d}"


def test_a_run_ends_when_it_ceases_to_improve(world: Path, tmp_path: Path) -> None:
    """No value is better by more than 9: the first is the best one, and the third ends the run."""
    run_dir = runs.fit(settings(tmp_path / "run", world, metric="val/bpb_en", patience=2, min_delta=9.0))
    assert max(runs.losses(run_dir)) == 6
    names = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    assert "step-00000006" in names and (run_dir / "checkpoints" / "best").resolve().name == "step-00000002"
    longer = settings(run_dir, world, metric="val/bpb_en")
    runs.fit(longer, "--ckpt_path", "auto")  # without patience it goes on
    assert max(runs.losses(run_dir)) == 12


def test_a_resumed_run_knows_what_was_best(world: Path, tmp_path: Path) -> None:
    whole = runs.fit(settings(tmp_path / "whole", world, metric=FACTS, patience=3))
    config = settings(tmp_path / "run", world, metric=FACTS, patience=3)
    config["checkpoint"] = {"every_n_steps": 4, "keep_last": 9}
    run_dir = runs.fit(config)
    runs.fit(config, "--ckpt_path", str(run_dir / "checkpoints" / "step-00000004"))
    assert runs.losses(run_dir) == runs.losses(whole)
    links = [(one / "checkpoints" / "best").resolve().name for one in (run_dir, whole)]
    assert links[0] == links[1]


def test_the_best_checkpoint_can_be_continued(world: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", world, metric="val/bpb_en", min_delta=9.0)
    run_dir = runs.fit(config)
    runs.fit(config, "--ckpt_path", str(run_dir / "checkpoints" / "best"))
    assert max(runs.losses(run_dir)) == 12
    assert any(path.name.endswith(".superseded") for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--monitor.metric=eval/synthetic_fact_en"], "did you mean eval/synthetic_facts_en?"),
        (
            ["--monitor.metric=val/bpb_fr"],
            "monitor.metric=val/bpb_fr is not measured in this run; did you mean val/bpb",
        ),
        (["--monitor.metric=val/loss", "--monitor.patience=0"], "monitor.patience=0 must be at least 1"),
        (["--monitor.patience=3"], "has no metric to watch"),
        (["--monitor.metric=val/loss", "--monitor.min_delta=-1"], "monitor.min_delta=-1.0"),
        (["--evaluation.output=x.json"], "evaluation.output=x.json is for validate"),
        (["--evaluation.every_n_tokens=0"], "evaluation.every_n_tokens=0 must be at least 1"),
        (["--evaluation.suite=cor_en"], "no evaluation suite is called 'cor_en'"),
        (["--evaluation.data_mirror=/no/such/place", "--evaluation.suite=core_en"], "data_mirror=/no/such/place"),
    ],
)
def test_what_cannot_be_watched_is_refused(
    flags: list[str], words: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.write(settings(tmp_path / "run", world), tmp_path / "config.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(path), *flags])
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_metric_begins_anew() -> None:
    one = Monitor("val/loss")
    one.load_state_dict({"metric": "val/loss", "mode": "min", "best": 2.0, "num_worse": 1})
    assert (one.best, one.num_worse) == (2.0, 1)
    other = Monitor("val/loss", mode="max")
    other.load_state_dict(one.state_dict())
    assert other.best is None
    with pytest.raises(InputError, match="it measures none"):
        one.check(())


def test_evaluation_by_tokens(world: Path, tmp_path: Path) -> None:
    """A step is 4 x 32 tokens: 300 are first passed by step 3, then by steps 5, 8, 10 and 12."""
    config = settings(tmp_path / "run", world)
    config["evaluation"] = {"every_n_tokens": 300, "at_end": False, "limit": 2}
    run_dir = runs.fit(config)
    names = [path.stem for path in sorted((run_dir / "eval").iterdir())]
    assert names == [f"step-{step:08d}" for step in (3, 5, 8, 10, 12)]
    record = json.loads((run_dir / "eval" / "step-00000003.json").read_text())
    assert record["tokens"] == 384 and record["seed"] == 1234 and record["precision"] == "32-true"


def test_validation_tells_the_losses_and_the_experts_of_each_language(world: Path, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", world)
    config["model"]["class_path"] = "modules.MoELM"
    config["model"]["init_args"]["architecture"]["moe"] = {"num_experts": 4, "top_k": 2}
    config["evaluation"] = {"at_end": False}
    run_dir = runs.fit(config)
    row = {name: float(value) for name, value in runs.metrics(run_dir)[12].items() if value}
    for suffix in ("", "_en", "_zh"):
        assert row[f"val/perplexity{suffix}"] == pytest.approx(2.718281828459045 ** row[f"val/loss{suffix}"])
    assert row["val/loss"] == pytest.approx((row["val/loss_en"] + row["val/loss_zh"]) / 2)  # equally many samples
    assert 0 < row["moe/language_distance"] < 1
    lines = [json.loads(line) for line in (run_dir / "language_load.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    shares = lines[-1]["languages"]
    assert set(shares) == {"en", "zh"} and set(shares["en"]) == {"0", "1"}
    distance = sum(abs(a - b) for layer in "01" for a, b in zip(shares["en"][layer], shares["zh"][layer], strict=True))
    assert distance / 4 == pytest.approx(row["moe/language_distance"], abs=2e-3)
    main(["report", str(run_dir)])
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "Experts on English text" in page and "Experts on Chinese text" in page


def test_validate_evaluates_tasks_that_are_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path / "run", world)
    run_dir = runs.fit(config)
    record = json.loads((run_dir / "eval" / "step-00000012.json").read_text())
    path = runs.write({**config, "monitor": {}}, tmp_path / "config.yaml")
    files = sorted(path for path in run_dir.rglob("*"))
    capsys.readouterr()
    words = ["validate", "--config", str(path), "--ckpt_path", str(run_dir / "checkpoints" / "step-00000012")]
    main(words)
    assert "eval/" not in capsys.readouterr().out  # tasks are for those who name them
    main([*words, "--evaluation.suite", "synthetic"])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("eval/", "val/")))
    assert float(printed["val/perplexity_zh"]) > 1
    for task in ("synthetic_facts_en", "synthetic_facts_zh"):
        assert float(printed[f"eval/{task}"]) == pytest.approx(record["results"][task]["acc"], abs=1e-4)
    assert sorted(path for path in run_dir.rglob("*")) == files
    output = tmp_path / "results.json"
    main([*words, "--evaluation.suite", "synthetic", "--evaluation.output", str(output)])
    found = json.loads(output.read_text())
    checkpoint = found.pop("checkpoint")
    assert found == record and checkpoint.endswith("step-00000012")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--evaluation.suite", "synthetic", "--evaluation.output", str(output)])
    assert ended.value.code == 2 and "nothing is ever overwritten" in capsys.readouterr().err
