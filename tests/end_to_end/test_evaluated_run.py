"""Runs that are evaluated and validated: figures, the best checkpoint, the end of a run that ceases to improve."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from app.checkpoint import verify
from app.checkpoint_folder import list_checkpoints
from app.cli import main
from callbacks.monitor import Monitor, Standing
from modules.errors import InputError
from modules.validation import Validation
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
    standing = {"best": 2.0, "name": "step-00000003", "num_worse": 1}
    one.load_state_dict({"metric": "val/loss", "mode": "min", "standing": standing})
    assert one.standing == Standing(**standing) and one.state_dict()["standing"] == standing
    other = Monitor("val/loss", mode="max")
    other.load_state_dict(one.state_dict())
    assert other.standing == Standing()
    with pytest.raises(InputError, match="it measures none"):
        one.check(())


def test_errors_are_better_when_they_are_fewer() -> None:
    for mode, errors, expected in (("auto", {"eval/a"}, "min"), ("max", {"eval/a"}, "max"), ("auto", (), "max")):
        one = Monitor("eval/a", mode=mode)  # type: ignore[arg-type]
        one.check({"eval/a"}, errors)
        assert one.mode == expected


def faked(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """Let validations find these values of val/loss."""
    real = Validation.metrics

    def metrics(self: Validation) -> dict[str, float]:
        step = len(seen) * 2 + 2 + offset[0]
        seen.append(step)
        return {**real(self), "val/loss": values[step]}

    seen: list[int] = []
    offset = [0]
    monkeypatch.setattr(Validation, "metrics", metrics)
    monkeypatch.setattr(
        Validation, "restart_at", lambda step: (seen.clear(), offset.__setitem__(0, step)), raising=False
    )


def best_name(run_dir: Path) -> str:
    return (run_dir / "checkpoints" / "best").resolve().name


def test_what_was_measured_behind_a_checkpoint_is_known_when_it_is_continued(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written before its step's validation, whose value a resumed run has to know all the same."""
    values = {2: 5.0, 4: 4.0, 6: 4.2, 8: 4.1, 10: 3.0, 12: 3.1, 14: 3.2}
    faked(monkeypatch, values)
    config = settings(tmp_path / "run", world, metric="val/loss", patience=3)
    config["trainer"]["max_steps"] = 10
    config["evaluation"] = {"at_end": False}
    config["checkpoint"] = {"every_n_steps": 2, "keep_last": 2}
    run_dir = runs.fit(config)
    assert best_name(run_dir) == "step-00000010"
    Validation.restart_at(10)  # type: ignore[attr-defined]
    config["trainer"]["max_steps"] = 14
    config["model"]["init_args"]["schedule"]["decay_fraction"] = 0.0
    runs.fit(config, "--ckpt_path", "auto")
    assert best_name(run_dir) == "step-00000010"
    verify(run_dir / "checkpoints" / "best")
    lines = [json.loads(line) for line in (run_dir / "monitor.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12, 14] and lines[-1]["standing"]["num_worse"] == 2


def test_a_value_that_is_no_number_is_no_better(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, {2: math.nan, 4: 4.0, 6: 3.0, 8: math.inf, 10: 3.5, 12: 3.75})
    config = settings(tmp_path / "run", world, metric="val/loss")
    run_dir = runs.fit(config)
    assert best_name(run_dir) == "step-00000006"
    lines = [json.loads(line) for line in (run_dir / "monitor.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [None, 4.0, 3.0, None, 3.5, 3.75]


def test_a_best_checkpoint_of_another_directory_is_not_linked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, {2: 1.0, 4: 4.0, 6: 4.2, 8: 4.1, 10: 4.3, 12: 4.4})
    config = settings(tmp_path / "run", world, metric="val/loss")
    config["checkpoint"] = {"every_n_steps": 4, "keep_last": 9}
    first = runs.fit(config)
    Validation.restart_at(4)  # type: ignore[attr-defined]
    config["trainer"]["default_root_dir"] = str(tmp_path / "other")
    other = runs.fit(config, "--ckpt_path", str(first / "checkpoints" / "step-00000004"))
    assert best_name(first) == "step-00000002" and best_name(other) == "step-00000008"
    verify(other / "checkpoints" / "best")


def test_a_transition_costs_no_patience(world: Path, tmp_path: Path) -> None:
    """It is evaluated at once, at the step of a regular evaluation, and does what the former network did."""
    config = settings(tmp_path / "run", world, metric=FACTS, patience=1, mode="max")
    config["growth"]["stages"] = [{"at_step": 2, "target": {"num_layers": 3}}]
    config["trainer"]["max_steps"] = 3
    config["evaluation"] = {"every_n_steps": 2, "at_transitions": True, "at_end": False, "limit": 40}
    run_dir = runs.fit(config)
    assert max(runs.losses(run_dir)) == 3
    lines = [json.loads(line) for line in (run_dir / "monitor.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"], line["standing"]["num_worse"]) for line in lines] == [(2, 0, 0), (2, 1, 0)]


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
    nothing = {"at_end": False, "at_transitions": False, "limit": 40}
    path = runs.write({**config, "monitor": {}, "evaluation": nothing}, tmp_path / "config.yaml")
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
