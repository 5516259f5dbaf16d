"""`growmoe compare`: a study of dense, mixture and grown models at equal accelerator time."""

import sys
from pathlib import Path

from app.study.design import ArmOptions, Keep, Measuring, Options, StudyBudget, make_arms


def compare(
    *,
    folder: Path,
    common: Options,
    sizes: dict[str, Options],
    arms: dict[str, ArmOptions],
    anchor: str = "dense",
    seeds: list[int] | None = None,
    budget: StudyBudget = StudyBudget(),
    measure: Measuring = Measuring(),
    keep_checkpoints: Keep = "last",
    launcher: str = "",
    only: str | None = None,
    report: bool = False,
) -> None:
    """Measure step times, work out what the budget buys each arm, run all of it, and write study.json, tables, picture.

    Stopped or killed, it goes on where it was: nothing that is finished is done again. Several processes may work on
    one study; with other values of `only` they take different runs.

    Args:
        folder: where the study lies; other studies need another one.
        common: options of fit that all runs share: data, precision, evaluation.
        sizes: by name, options of fit laid over these.
        arms: by name, what is compared.
        anchor: the arm whose runs set the budget of their size, a dense one.
        seeds: every run is made with each of them, for weights and for the order of the data; 0 and 1 when left out.
        budget: how long runs are.
        measure: how step times are measured.
        keep_checkpoints: of runs that have their result: all, the last one, or none.
        launcher: what starts `-m app fit` for several processes, such as "torchrun --nproc_per_node 8".
        only: make runs whose arm or seed has this word in its name (nano, grown, seed-0); tables show what is there.
        report: make no run, and write the tables of what is there.
    """
    from app.study.children import ChildFailed
    from app.study.report import write_report
    from app.study.study import Study

    failures: list[str] = []
    try:
        if report:
            study = Study.read(folder)
        else:
            made = make_arms(common, sizes, arms, anchor)
            given = [0, 1] if seeds is None else seeds
            study = Study(folder, made, anchor, given, budget, measure, keep_checkpoints).begin()
            failures = study.work(_tell, launcher, only)
    except ChildFailed as error:
        sys.stderr.write(f"growmoe compare: {error}\n")
        sys.exit(1)
    for path in write_report(study):
        sys.stdout.write(f"{path}\n")
    if failures:
        sys.stderr.write(f"growmoe compare: {len(failures)} runs failed; the same command tries them again\n")
        sys.exit(1)


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
