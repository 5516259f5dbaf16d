"""A study: what is compared, what the budget buys, what runs come to, and what is refused."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from app.laws.fairseq import speed_up
from app.study import measuring, running
from app.study.analysis import Finished, Spread, front
from app.study.budget import arm_steps, cost_of
from app.study.children import ChildFailed
from app.study.design import Arm, ArmOptions, Measuring, Options, StudyBudget, make_arms, merged
from app.study.locking import held
from app.study.report import write_report
from app.study.running import Run, make_runs, plan_runs
from app.study.study import Study
from modules.errors import InputError

SIZES = {
    "small": Options({"model": {"init_args": {"architecture": {"dim": 16}}}}),
    "large": Options({"model": {"init_args": {"architecture": {"dim": 32}}}}),
}
ARMS = {
    "moe": ArmOptions(Options({"model": {"class_path": "modules.MoELM"}})),
    "dense": ArmOptions(Options({"model": {"class_path": "modules.DenseLM"}})),
    "grown": ArmOptions(sizes={"large": Options({"model": {"init_args": {"architecture": {"dim": 16}}}})}),
}
COMMON = Options({"model": {"init_args": {"schedule": {"warmup_steps": 2}}}, "trainer": {"precision": "32-true"}})
MACHINE = {"device": "a processor", "devices": 1}
SECONDS = {"small-dense": 0.1, "small-moe": 0.125, "large-dense": 0.3, "large-moe": 0.4, "large-grown": 0.3}


def arms() -> list[Arm]:
    return make_arms(COMMON, SIZES, ARMS, "dense")


# -- the design --------------------------------------------------------------------------------------------------------


def test_arms_are_layers_of_options() -> None:
    made = {arm.key: arm for arm in arms()}
    assert list(made) == ["small-dense", "small-moe", "large-dense", "large-moe", "large-grown"], "anchors first"
    assert made["large-moe"].options["model"] == {
        "class_path": "modules.MoELM",
        "init_args": {"architecture": {"dim": 32}, "schedule": {"warmup_steps": 2}},
    }
    assert made["large-grown"].options["model"]["init_args"]["architecture"] == {"dim": 16}
    given = made["small-moe"].configuration(seed=3, run_dir="there", steps=70)
    assert given["trainer"] == {"precision": "32-true", "max_steps": 70, "default_root_dir": "there"}
    assert (given["seed_everything"], given["data"]) == (3, {"init_args": {"seed": 3}})
    assert "max_steps" not in made["small-moe"].configuration()["trainer"], "options of an arm stay as they are"


def test_merging_goes_key_by_key() -> None:
    first = {"a": {"b": 1, "c": 2}, "d": [1, 2]}
    assert merged(first, {"a": {"c": {"e": 3}}, "d": [3]}) == {"a": {"b": 1, "c": {"e": 3}}, "d": [3]}
    assert first == {"a": {"b": 1, "c": 2}, "d": [1, 2]}


@pytest.mark.parametrize(
    ("sizes", "kinds", "anchor", "told"),
    [
        ({}, ARMS, "dense", "compares nothing"),
        (SIZES, ARMS, "thick", "anchor=thick is none of the arms"),
        ({"../up": Options()}, ARMS, "dense", "cannot be a folder's"),
        (SIZES, {"dense": ArmOptions(sizes={"small": Options()})}, "dense", "the anchor dense has no size large"),
        (SIZES, {"dense": ArmOptions(), "x": ArmOptions(sizes={"huge": Options()})}, "dense", "names huge"),
        (SIZES, {"dense": ArmOptions(Options({"trainer": {"max_steps": 5}}))}, "dense", "trainer.max_steps=5"),
        (SIZES, {"dense": ArmOptions(Options({"data": {"init_args": {"seed": 5}}}))}, "dense", "seed=5"),
    ],
)
def test_designs_that_cannot_be(sizes: Any, kinds: Any, anchor: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        make_arms(Options(), sizes, kinds, anchor)


def test_budgets_that_cannot_be() -> None:
    for wrong in ({"tokens_per_parameter": 0}, {"accelerator_seconds": -1.0}, {"accelerator_seconds": {"a": 0.0}}):
        with pytest.raises(InputError, match="must be"):
            StudyBudget(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="modes"):
        StudyBudget(modes=["tokens", "tokens"])
    with pytest.raises(InputError, match="no entry for the size large"):
        StudyBudget(accelerator_seconds={"small": 1.0}).seconds_of("large")


# -- measurements and budgets ------------------------------------------------------------------------------------------


def measurement(key: str, parameters: int = 1000, flops: float = 6000.0) -> dict[str, Any]:
    """As `growmoe measure` writes it; a grown arm has two stages."""
    seconds = SECONDS[key]

    def stage(step_s: float, trigger: dict[str, float] | None) -> dict[str, Any]:
        return {
            "trigger": trigger,
            "architecture": {"dim": 16, "num_layers": 2},
            "parameters": {"total": 9, "active": 9, "non_embedding": 9, "active_non_embedding": parameters},
            "flops_per_token": flops * step_s / seconds,
            "step_s": step_s,
            "step_s_quartiles": [step_s, step_s],
            "steps_s": [step_s, 0.9 * step_s, 1.3 * step_s],
            "wait_s": 0.01,
            "tokens_per_s": 10 / step_s,
            "mfu": 0.5,
            "peak_mib": 10.0,
            "parts_s": {"input": 0.01, "rest": step_s - 0.01},
            "transition_s": 0.0 if trigger is None else 1.5,
        }

    grown = [stage(seconds / 3, None), stage(seconds, {"at_fraction": 0.5})]
    return {
        "format": 1,
        "machine": MACHINE,
        "versions": {"torch": "2", "growmoe": "0"},
        "layout": "one process",
        "precision": "32-true",
        "seq_len": 5,
        "samples_per_step": 2,
        "tokens_per_step": 10,
        "peak": {"flops": 1e9, "source": "given"},
        "stages": grown if key.endswith("grown") else [stage(seconds, None)],
    }


def costs() -> dict[str, Any]:
    return {key: cost_of(measurement(key, flops=60000 * seconds)) for key, seconds in SECONDS.items()}


def test_every_arm_gets_the_time_of_its_anchor() -> None:
    known, budget = costs(), StudyBudget(tokens_per_parameter=20.0)
    anchor = known["large-dense"]
    steps = {key: arm_steps(known[key], anchor, "large", "step_time", budget) for key in known if "large" in key}
    assert steps["large-dense"] == 2000, "20 tokens for each of 1000 parameters, 10 tokens a step"
    assert steps["large-moe"] == 1500
    for key in ("large-moe", "large-grown"):
        assert known[key].accelerator_seconds(steps[key]) <= 600.0 < known[key].accelerator_seconds(steps[key] + 1)
    assert arm_steps(known["large-moe"], anchor, "large", "tokens", budget) == 2000
    assert arm_steps(known["large-moe"], anchor, "large", "flops", budget) == 1500
    assert arm_steps(known["large-moe"], anchor, "large", "own_chinchilla", budget) == 2000


def test_a_budget_in_seconds() -> None:
    known, budget = costs(), StudyBudget(accelerator_seconds={"small": 50.0, "large": 90.0})
    assert arm_steps(known["small-dense"], known["small-dense"], "small", "step_time", budget) == 500
    assert arm_steps(known["large-moe"], known["large-dense"], "large", "step_time", budget) == 225


def test_runs_too_short_for_their_warm_up_are_refused() -> None:
    with pytest.raises(InputError, match="buys small-dense 2 steps, in which the warm-up of 2 steps does not end"):
        plan_runs(arms(), costs(), "dense", StudyBudget(accelerator_seconds=0.25), [0], Path("x"))


def test_modes_that_come_to_the_same_share_a_run() -> None:
    budget = StudyBudget(modes=["step_time", "tokens", "flops"])
    runs = plan_runs(arms(), costs(), "dense", budget, [0, 1], Path("x"))
    first = [(run.arm.key, run.steps, run.modes) for run in runs if run.seed == 0]
    assert ("large-dense", 2000, ("step_time", "tokens", "flops")) in first
    assert ("large-moe", 1500, ("step_time", "flops")) in first and ("large-moe", 2000, ("tokens",)) in first
    assert [run.seed for run in runs] == [0] * len(first) + [1] * len(first)
    assert len({run.folder for run in runs}) == len(runs)


def test_a_plateau_has_no_budget() -> None:
    record = measurement("large-grown")
    record["stages"][1]["trigger"] = {}
    with pytest.raises(InputError, match="begins at a plateau"):
        cost_of(record)


def test_rounds_are_taken_together() -> None:
    first, second = measurement("small-dense"), measurement("small-dense")
    second["stages"][0] |= {"steps_s": [0.2, 0.4, 0.3], "peak_mib": 12.0}
    second["peak"] = {"flops": 2e9, "source": "measured"}
    (stage,) = measuring.combined([first, second])["stages"]
    assert stage["step_s"] == pytest.approx((0.13 + 0.2) / 2)
    assert stage["tokens_per_s"] == pytest.approx(10 / stage["step_s"])
    assert stage["mfu"] == pytest.approx(6000 * 10 / stage["step_s"] / 2e9)
    assert sum(stage["parts_s"].values()) == pytest.approx(stage["step_s"])
    assert stage["peak_mib"] == 12.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"machine": {"device": "another", "devices": 1}}, "different machine: device 'a processor' and 'another'"),
        ({"machine": {"device": "a processor", "devices": 2}}, "devices 1 and 2"),
        ({"versions": {"torch": "3", "growmoe": "0"}}, "different versions: torch '2' and '3'"),
    ],
)
def test_other_hardware_is_refused(
    change: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a study goes on elsewhere: with its first new measurement, before anything is trained."""

    def measure(arguments: Sequence[str], log: Path, launcher: str = "") -> None:
        path = Path(arguments[arguments.index("--output") + 1])
        made = list(tmp_path.glob("*.json"))
        path.write_text(json.dumps(measurement(path.stem) | (change if len(made) == 3 else {})))

    monkeypatch.setattr(measuring, "run_command", measure)
    with pytest.raises(InputError, match=told):
        measuring.measure_arms(arms(), tmp_path, Measuring(rounds=1), lambda text: None)
    assert len(list(tmp_path.glob("*.json"))) == 3, "what does not fit is not kept"
    assert len(measuring.read_arms(arms(), tmp_path)) == 3, "and what was there can be used as before"


def test_measured_arms_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def measure(arguments: Sequence[str], log: Path, launcher: str = "") -> None:
        calls.append(list(arguments))
        path = Path(arguments[arguments.index("--output") + 1])
        path.write_text(json.dumps(measurement(path.stem)))

    monkeypatch.setattr(measuring, "run_command", measure)
    for _ in range(2):
        found = measuring.measure_arms(arms(), tmp_path, Measuring(rounds=2), lambda text: None)
    assert list(found) == [arm.key for arm in arms()]
    assert len(calls) == 10
    order = [Path(call[call.index("--config") + 1]).stem for call in calls]
    assert order[:5] == order[5:] == [arm.key for arm in arms()], "rounds over all arms"


# -- runs --------------------------------------------------------------------------------------------------------------


class Trainings:
    """In the place of `growmoe fit`: notes what is trained, and leaves logs of a run behind."""

    def __init__(self, failing: str = "", slower: float = 1.0) -> None:
        self.failing, self.slower = failing, slower
        self.made: list[str] = []

    def __call__(self, arguments: Sequence[str], log: Path, launcher: str = "") -> None:
        assert arguments[0] == "fit" and arguments[-2:] == ["--ckpt_path", "auto"]
        run_dir = Path(arguments[2]).with_suffix("")
        self.made.append(f"{run_dir.parent.name}/{run_dir.name}")
        if self.failing and self.failing in self.made[-1]:
            raise ChildFailed("it broke")
        steps = int(run_dir.name.split("-")[1])
        seed = int(run_dir.name.split("-")[3])
        rows = ["step,data/tokens,perf/accelerator_s,val/bpb_en,val/bpb_zh,val/loss"]
        for step in (steps // 4, steps // 2, 3 * steps // 4, steps):
            loss = 8 - step**0.25 - 0.01 * seed - (0.5 if "moe" in run_dir.parent.name else 0.0)
            seconds = step * SECONDS[run_dir.parent.name] * self.slower
            rows.append(f"{step},{10 * step},{seconds},{loss / 3},{loss / 2},{loss}")
        run_dir.mkdir()
        (run_dir / "metrics.csv").write_text("\n".join(rows) + "\n")
        (run_dir / "eval").mkdir()
        evaluation = {"step": steps, "results": {"task": {"acc": 0.25 + 0.1 * seed, "chance": 0.25}}}
        (run_dir / "eval" / f"step-{steps:08d}.json").write_text(json.dumps(evaluation))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """All step times are there, and no run."""
    budget = StudyBudget(accelerator_seconds={"small": 20.0, "large": 90.0})
    made = Study(tmp_path / "study", arms(), "dense", [0, 1], budget, Measuring(rounds=1)).begin()
    (made.folder / "measure").mkdir()
    for arm in made.arms:
        path = measuring.record_path(made.folder / "measure", arm, 0)
        path.write_text(json.dumps(measurement(arm.key, flops=60000 * SECONDS[arm.key])))
    return made


def test_finished_runs_are_not_made_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(failing="small-moe")
    monkeypatch.setattr(running, "run_command", trainings)
    failures = study.work(lambda text: None)
    assert [failure.split(":")[0] for failure in failures] == ["small-moe, seed 0", "small-moe, seed 1"]
    assert len(trainings.made) == 10, "a failure keeps no other run back"
    trainings.failing = ""
    assert study.work(lambda text: None) == []
    assert len(trainings.made) == 12
    assert all("small-moe" in name for name in trainings.made[10:])
    assert study.work(lambda text: None, only="grown") == [] and len(trainings.made) == 12
    with pytest.raises(InputError, match="only=thick is in the name of no run"):
        study.work(lambda text: None, only="thick")


def test_a_run_that_is_under_way_is_left_to_its_process(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The others are made first; then it is waited for, and not made again."""
    monkeypatch.setattr(running, "run_command", Trainings())
    runs, told, released = study.runs(study.measured()[1]), list[str](), threading.Event()
    first = runs[0]

    def other_process() -> None:
        with held(first.folder.with_suffix(".lock")) as is_ours:
            assert is_ours
            taken.set()
            released.wait(30)
            running._make(first, costs()[first.arm.key], "all", "")

    def tell(text: str) -> None:
        told.append(text)
        if text.startswith("waiting"):
            released.set()

    taken = threading.Event()
    other = threading.Thread(target=other_process)
    other.start()
    assert taken.wait(30)
    with held(first.folder.with_suffix(".lock")) as again:
        assert not again
    assert make_runs(runs, costs(), tell, "all") == []
    other.join()
    assert told[-1] == "waiting for another process: small-dense, seed 0"
    assert all(run.result for run in runs) and not any("run 1 of 1" in text for text in told)


def test_lengths_stay_whatever_is_measured_later(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings()
    monkeypatch.setattr(running, "run_command", trainings)
    study.work(lambda text: None)
    before = [run.folder for run in study.runs(study.measured()[1])]
    for arm in study.arms:
        later = measurement(arm.key, flops=60000 * SECONDS[arm.key])
        for stage in later["stages"]:
            stage["steps_s"] = [3 * seconds for seconds in stage["steps_s"]]
        measuring.record_path(study.folder / "measure", arm, 1).write_text(json.dumps(later))
    assert study.measured()[1]["small-dense"]["stages"][0]["step_s"] > 0.1
    assert [run.folder for run in study.runs(study.measured()[1])] == before
    assert study.work(lambda text: None) == [] and len(trainings.made) == 10


def test_a_run_that_was_killed_behind_its_last_checkpoint_is_validated(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed at its last step it would do nothing more: it is taken back to an earlier one."""
    run = study.runs(study.measured()[1])[0]
    for step in (0, run.steps):
        path = run.folder / "checkpoints" / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    seen: list[list[str]] = []

    def train(arguments: Sequence[str], log: Path, launcher: str = "") -> None:
        seen.append([path.name for path in (run.folder / "checkpoints").iterdir()])
        (run.folder / "metrics.csv").write_text(f"step,val/bpb_en,val/loss\n{run.steps},1.5,3.0\n")

    monkeypatch.setattr(running, "run_command", train)
    running._make(run, costs()[run.arm.key], "all", "")
    assert seen == [["step-00000000"]]
    assert run.result is not None and run.result["bpb"] == 1.5
    (run.folder / "result.json").unlink()
    running._make(run, costs()[run.arm.key], "all", "")
    assert len(seen) == 1, "what is trained is only read again"
    (run.folder / "metrics.csv").write_text(f"step,val/bpb_en,val/loss\n{run.steps - 1},1.5,3.0\n")
    with pytest.raises(InputError, match=f"not validated at its last step {run.steps}"):
        running._make(run, costs()[run.arm.key], "all", "")


def test_an_arm_that_was_never_measured_may_be_corrected(tmp_path: Path) -> None:
    budget = StudyBudget(accelerator_seconds=20.0)
    wrong = make_arms(merged(COMMON, {"typo": 1}), SIZES, ARMS, "dense")  # type: ignore[arg-type]
    misnamed = [*wrong, Arm("small", "mao", {})]
    Study(tmp_path / "study", misnamed, "dense", [0], budget, Measuring()).begin()
    right = Study(tmp_path / "study", arms(), "dense", [0], budget, Measuring()).begin()
    assert all("typo" not in arm.options and arm.name != "mao" for arm in right.arms)


def test_a_result_that_cannot_be_read_is_one_line(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run_command", Trainings())
    study.work(lambda text: None)
    path = study.runs(study.measured()[1])[0].folder / "result.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(InputError, match="delete it to have it written again"):
        write_report(study)


def test_a_folder_belongs_to_one_study(study: Study, tmp_path: Path) -> None:
    other = make_arms(Options({"trainer": {"precision": "bf16-mixed"}}), SIZES, ARMS, "dense")
    no_budget = StudyBudget(accelerator_seconds={"small": 1.0})
    for wrong, told in (([], "at least one seed"), ([0, 0], "each once"), ([-1], "none below 0")):
        with pytest.raises(InputError, match=told):
            Study(tmp_path / "new", arms(), "dense", wrong, study.budget, study.measuring).begin()
    with pytest.raises(InputError, match="no entry for the size large"):
        Study(tmp_path / "new", arms(), "dense", [0], no_budget, study.measuring).begin()
    assert not (tmp_path / "new").exists()
    for changed, told in (
        (Study(study.folder, other, "dense", [0], study.budget, study.measuring), "small-dense is another one"),
        (Study(study.folder, arms(), "dense", [0], StudyBudget(), study.measuring), "budget is another one"),
    ):
        with pytest.raises(InputError, match=told):
            changed.begin()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds something else"):
        Study(tmp_path / "full", arms(), "dense", [0], study.budget, study.measuring).begin()
    added = Study(study.folder, arms(), "dense", [7], study.budget, study.measuring).begin()
    assert added.seeds == [0, 1, 7] and Study.read(study.folder) == added


# -- what it says ------------------------------------------------------------------------------------------------------


def finished(study: Study, monkeypatch: pytest.MonkeyPatch) -> Finished:
    monkeypatch.setattr(running, "run_command", Trainings())
    assert study.work(lambda text: None) == []
    runs = study.runs(study.measured()[1])
    return Finished(study.arms, study.anchor, costs(), [(run, run.result or {}) for run in runs])


def test_points_are_means_over_seeds_and_differences_of_the_same_seed(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = {point.key: point for point in finished(study, monkeypatch).points("step_time")}
    dense, moe = points["large-dense"], points["large-moe"]
    losses = [8 - 300**0.25 - 0.01 * seed for seed in (0, 1)]
    assert dense.loss == Spread(pytest.approx(sum(losses) / 2), pytest.approx(0.01 / 2**0.5), 2)
    assert dense.bpb.mean == pytest.approx(sum(losses) / 2 * (1 / 3 + 1 / 2) / 2)
    assert dense.by_language["en"].mean == pytest.approx(sum(losses) / 6)
    assert dense.accuracy is not None and dense.accuracy.mean == pytest.approx(0.3)
    assert dense.bpb_less is None and moe.bpb_less is not None
    assert moe.bpb_less.deviation == pytest.approx(0.0, abs=1e-12), "seeds move both alike"
    assert moe.bpb_less.mean == pytest.approx(dense.bpb.mean - moe.bpb.mean)
    assert (moe.steps, moe.tokens, moe.accelerator_seconds) == (225, 2250, pytest.approx(90.0))


def test_equal_tokens_are_read_before_any_decay(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finished(study, monkeypatch)
    points = {point.key: point for point in found.points("tokens") if point.size == "large"}
    assert all(point.is_from_curves and point.accuracy is None for point in points.values())
    shortest = 10 * (3 * 225 // 4)  # the last validation of the shortest run that comes before 80 % of it
    assert [point.tokens for point in points.values()] == [pytest.approx(shortest)] * 2
    assert "large-grown" not in points, "it grows after half of its steps, and was validated there at 3/4"
    assert points["large-dense"].loss.mean > found.points("step_time")[2].loss.mean
    assert not found.points("own_chinchilla")


def test_only_tasks_of_all_runs_are_compared(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    found = finished(study, monkeypatch)
    for run, result in found.runs:
        if run.arm.key == "large-moe":
            result["tasks"]["easy"] = {"value": 1.0}
    points = {point.key: point for point in found.points("step_time")}
    assert points["large-moe"].accuracy == Spread(pytest.approx(0.3), pytest.approx(0.1 / 2**0.5), 2)
    found = Finished(found.arms, found.anchor, found.costs, found.runs)
    for run, result in found.runs:
        if run.arm.key == "large-moe":
            result["tasks"] = {}
    assert all(point.accuracy is None for point in found.points("step_time"))


def test_the_front_holds_what_nothing_beats(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    points = finished(study, monkeypatch).points("step_time")
    best = front(points, "bpb")
    for point in points:
        beaten = any(o.step_s <= point.step_s and o.bpb.mean < point.bpb.mean for o in points if o is not point)
        assert (point in best) == (not beaten), point.key


def test_speed_up_of_equal_and_shifted_curves() -> None:
    curve = [(1e3, 5.0), (1e4, 4.0), (1e5, 3.2)]
    assert speed_up(curve, 1e4, 4.0) == pytest.approx(1.0)
    assert speed_up(curve, 1e4 / 4, 4.0) == pytest.approx(4.0)
    with pytest.raises(InputError, match="do not fall with their compute"):
        speed_up([(1e3, 4.0), (1e4, 5.0)], 1e3, 4.5)


def test_speed_up_on_the_way(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that is the anchor is as fast as it; one whose losses come at half the time is twice as fast."""
    found = finished(study, monkeypatch)
    dense = next(arm for arm in study.arms if arm.key == "large-dense")
    same = found.speed_up_on_the_way(dense, "accelerator_seconds")
    assert same == Spread(pytest.approx(1.0), pytest.approx(0.0, abs=1e-9), 2)
    moe = next(arm for arm in study.arms if arm.key == "large-moe")
    for run, result in found.runs:
        if run.arm.key == "large-moe":
            other = next(r for o, r in found.runs if o.arm.key == "large-dense" and o.seed == run.seed)
            result["curve"] = other["curve"] | {
                "accelerator_seconds": [s / 2 for s in other["curve"]["accelerator_seconds"]]
            }
            result["steps"] = other["steps"]
    twice = found.speed_up_on_the_way(moe, "accelerator_seconds")
    assert twice is not None and twice.mean == pytest.approx(2.0)


def test_the_report_holds_all_of_it(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [path.name for path in write_report(study)]
    assert before == ["study.json", "study.md", "report.html"], "before any run there is no picture"
    finished(study, monkeypatch)
    assert {path.name for path in write_report(study)} == {"study.json", "study.md", "study.png", "report.html"}
    record = json.loads((study.folder / "study.json").read_text())
    assert (record["runs_planned"], record["runs_finished"]) == (10, 10)
    assert record["step_time_ratio"]["large-moe"] == pytest.approx(4 / 3)
    assert record["machine"] == MACHINE and set(record["points"]) == {"step_time", "tokens", "flops"}
    assert record["fronts"]["step_time"]["bpb"] and "tokens" not in record["fronts"]
    text = (study.folder / "study.md").read_text()
    assert "10 of 10 runs are finished" in text and "### At equal accelerator time" in text
    page = (study.folder / "report.html").read_text()
    assert "<svg" in page and "Speed-up factors" in page and "<script" not in page
    (study.folder / "report.html").write_text("somebody's own page")
    with pytest.raises(InputError, match="so it stays"):
        write_report(study)


@pytest.mark.parametrize(("slower", "is_told"), [(1.05, False), (1.3, True)])
def test_time_that_was_not_planned_is_told(
    slower: float, is_told: bool, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run_command", Trainings(slower=slower))
    study.work(lambda text: None, only="dense")
    write_report(study)
    text = (study.folder / "study.md").read_text()
    assert ("small-dense 1.30 times, large-dense 1.30 times" in text) == is_told
    assert ("Time taken is not what was planned" in text) == is_told


def test_a_run_keeps_the_checkpoints_that_are_wanted(tmp_path: Path) -> None:
    for keep, left in (("all", 3), ("last", 1), ("none", 0)):
        folder = tmp_path / keep
        for step in (1, 2, 3):
            (folder / f"step-{step:08d}").mkdir(parents=True)
            (folder / f"step-{step:08d}" / "manifest.json").write_text("{}")
        running._prune(folder, keep)  # type: ignore[arg-type]
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in (1, 2, 3)][3 - left :]
    assert isinstance(Run(arms()[0], 0, 5, ("tokens",), tmp_path / "none").result, type(None))
