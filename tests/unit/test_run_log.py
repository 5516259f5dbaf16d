"""The run log: rows merge, files continue, and nothing is lost when a process dies."""

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.metrics_table import read_table
from app.run_log import OPEN_ROWS, RunLog
from modules.errors import InputError
from modules.files import replace_file
from modules.jsonl import append_jsonl, read_jsonl


def rows_of(run_dir: Path) -> list[dict[str, str]]:
    """The file as any CSV reader sees it, blanks left out."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def write_steps(run_dir: Path, *steps: int, **extra: float) -> None:
    log = RunLog(run_dir)
    for step in steps:
        log.log_metrics({"loss": step / 2, **extra}, step)
    log.finalize("success")


def logs_of(run_dir: Path) -> dict[str, bytes]:
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_columns_are_sorted_and_calls_at_one_step_share_a_row(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.log_metrics({"train/loss": 2.5, "epoch": 0}, step=0)
    log.log_metrics({"perf/step_ms": 10}, step=0)
    log.log_metrics({"train/loss": 2.25}, step=1)
    log.log_metrics({"val/bpb_en": torch.tensor(1.5), "train/loss": 2.0}, step=1)
    log.log_metrics({"late": np.float64(0.1)})  # no step: the last row
    log.finalize("success")
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,late,perf/step_ms,train/loss,val/bpb_en\n0,,10,2.5,\n1,0.1,,2.0,1.5\n"
    )


def test_nothing_is_touched_before_the_first_metric(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    log.log_hyperparams({"a": 1})
    log.log_metrics({"epoch": 0}, 0)
    log.save()
    log.finalize("success")
    assert not (tmp_path / "run").exists()
    assert (log.save_dir, log.log_dir, log.name, log.version) == (str(tmp_path / "run"), str(tmp_path / "run"), "", "")


def test_rows_reach_the_file_every_few_rows_and_on_save(tmp_path: Path) -> None:
    log = RunLog(tmp_path, flush_every=3)
    for step in range(5):
        log.log_metrics({"loss": 1.0}, step)
    assert len(rows_of(tmp_path)) == 3
    log.save()
    assert len(rows_of(tmp_path)) == 5
    log.log_metrics({"loss": 1.0}, 5)
    assert len(rows_of(tmp_path)) == 5
    log.after_save_checkpoint(None)  # type: ignore[arg-type]
    assert len(rows_of(tmp_path)) == 6
    with pytest.raises(InputError, match="flush_every=0 must be at least 1"):
        RunLog(tmp_path, flush_every=0)


def test_appending_does_not_rewrite_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, flush_every=1)
    log.log_metrics({"loss": 1.0, "lr": 0.5}, 0)
    inode = (tmp_path / "metrics.csv").stat().st_ino
    monkeypatch.setattr("app.run_log.replace_file", lambda *_: pytest.fail("rewritten"))
    for step in range(1, 40):
        log.log_metrics({"loss": 1.0}, step)
        log.log_metrics({"lr": 0.25}, max(step - OPEN_ROWS + 1, 0))  # a late metric
    assert (tmp_path / "metrics.csv").stat().st_ino == inode and len(rows_of(tmp_path)) == 40


def test_a_new_column_rewrites_the_file_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, flush_every=1)
    for step in range(10):
        log.log_metrics({"train/loss": step / 3}, step)
    log.log_metrics({"moe/load_cv": 0.5}, 10)
    log.log_metrics({"moe/load_cv": 0.25}, 11)
    rows = rows_of(tmp_path)
    assert (tmp_path / "metrics.csv").read_text().startswith("step,moe/load_cv,train/loss\n")
    assert [row.get("moe/load_cv") for row in rows] == [None] * 10 + ["0.5", "0.25"]
    assert [float(row["train/loss"]) for row in rows[:10]] == [step / 3 for step in range(10)]


values = st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False))
calls = st.lists(
    st.tuples(
        st.integers(0, 25),
        st.dictionaries(st.sampled_from(["a", 'b,"x"', "c d", "中"]), values, max_size=3),
        st.booleans(),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(calls=calls, flush_every=st.integers(1, 9))
def test_any_order_of_calls_gives_the_merged_table(calls: list[Any], flush_every: int, tmp_path_factory: Any) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    log = RunLog(run_dir, flush_every)
    expected: dict[int, dict[str, float]] = {}
    for step, metrics, is_restart in calls:
        log.log_metrics(metrics, step)
        if metrics:
            expected.setdefault(step, {}).update(metrics)
        if is_restart:
            log.finalize("success")
            log = RunLog(run_dir, flush_every)
    log.finalize("success")
    if not expected:
        return
    table = read_table(run_dir / "metrics.csv")
    assert table.names == sorted({name for row in expected.values() for name in row})
    assert list(table.rows) == sorted(expected)
    assert {s: {n: float(v) for n, v in row.items()} for s, row in table.rows.items()} == expected
    assert table.to_bytes() == (run_dir / "metrics.csv").read_bytes()


@given(cut=st.integers(0, 200))
@settings(deadline=None)
def test_a_file_torn_anywhere_continues(cut: int, tmp_path_factory: Any) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    write_steps(run_dir, *range(8))
    path = run_dir / "metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept = max(whole[:cut].count(b"\n") - 1, 0)
    write_steps(run_dir, 8, 9)
    assert [int(row["step"]) for row in rows_of(run_dir)] == [*range(kept), 8, 9]
    assert all(float(row["loss"]) == int(row["step"]) / 2 for row in rows_of(run_dir))


def test_a_tail_of_zeros_after_a_power_cut_is_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, 0, 1)
    with (tmp_path / "metrics.csv").open("ab") as file:
        file.write(b"\0" * 300)
    write_steps(tmp_path, 2)
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "text", ["name,age\nA,3\n", "step,a\n1,2\nx,2\n", "step,a\n1,2,3\n", "step,a,a\n1,2,3\n", "step,a\n-1,2\n"]
)
def test_a_file_that_is_no_metrics_table_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.csv"):
        RunLog(tmp_path).log_metrics({"loss": 1.0}, 0)
    assert (tmp_path / "metrics.csv").read_text() == text


def test_a_file_that_vanishes_or_shrinks_meanwhile_gets_no_hole(tmp_path: Path) -> None:
    log = RunLog(tmp_path, flush_every=1)
    for step in range(20):
        log.log_metrics({"loss": 1.0}, step)
    (tmp_path / "metrics.csv").unlink()
    log.log_metrics({"loss": 1.0}, 20)
    os.truncate(tmp_path / "metrics.csv", 12)
    log.log_metrics({"loss": 1.0}, 21)
    steps = [int(row["step"]) for row in rows_of(tmp_path)]
    assert steps[-1] == 21 and steps == sorted(steps) and b"\0" not in (tmp_path / "metrics.csv").read_bytes()


def test_a_death_during_a_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, flush_every=1)
    for step in range(10):
        log.log_metrics({"loss": 1.0}, step)
    old = (tmp_path / "metrics.csv").read_bytes()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            log.log_metrics({"accuracy": 0.5}, 10)
        assert logs_of(tmp_path) == {"metrics.csv": old}
    log.log_metrics({"loss": 1.0}, 11)  # the row that could not be written comes with the next
    assert len(rows_of(tmp_path)) == 12 and rows_of(tmp_path)[10]["accuracy"] == "0.5"


def test_the_new_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (events.append("fsync"), sync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (events.append("rename"), rename(a, b)))
    replace_file(tmp_path / "file", b"new")
    assert events == ["fsync", "rename", "fsync"]


def test_values_and_names_that_cannot_be_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, flush_every=1)
    log.log_metrics({"nan": float("nan"), "inf": float("inf"), "flag": True, "big": 2**53 + 1}, 0)
    assert rows_of(tmp_path) == [{"step": "0", "nan": "nan", "inf": "inf", "flag": "1", "big": "9007199254740993"}]
    with pytest.raises(TypeError, match="metric 'text' has the value 'x'"):
        log.log_metrics({"text": "x"}, 1)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="line break"):
        log.log_metrics({"a\nb": 1.0}, 1)


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_steps(tmp_path, 0, 1, 2)
    before = logs_of(tmp_path)
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    log = RunLog(tmp_path, flush_every=1)
    log.resume_at(0)
    log.log_metrics({"loss": 1.0}, 5)
    log.after_save_checkpoint(None)  # type: ignore[arg-type]
    log.finalize("success")
    assert logs_of(tmp_path) == before


def test_resume_drops_the_rows_to_come_and_keeps_the_old_file(tmp_path: Path) -> None:
    write_steps(tmp_path, *range(0, 50, 10))
    old = (tmp_path / "metrics.csv").read_bytes()
    log = RunLog(tmp_path)
    log.resume_at(20)
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "10", "20"]
    assert (tmp_path / "metrics.until-step-00000040.csv").read_bytes() == old
    log.log_metrics({"loss": 99.0}, 30)
    log.finalize("success")
    assert rows_of(tmp_path)[-1] == {"step": "30", "loss": "99.0"}

    log.resume_at(30)  # nothing to drop, nothing to keep
    assert len(logs_of(tmp_path)) == 2
    write_steps(tmp_path, 40)
    RunLog(tmp_path).resume_at(10)  # the same name again: the first copy stays
    assert (tmp_path / "metrics.until-step-00000040.csv").read_bytes() == old
    assert b"99.0" in (tmp_path / "metrics.until-step-00000040-2.csv").read_bytes()


def test_resume_in_the_middle_of_a_run_starts_from_what_was_logged(tmp_path: Path) -> None:
    log = RunLog(tmp_path, flush_every=50)
    for step in range(OPEN_ROWS * 3):
        log.log_metrics({"loss": 1.0}, step)
    log.resume_at(5)
    log.log_metrics({"loss": 2.0}, 6)
    log.save()
    assert [row["loss"] for row in rows_of(tmp_path)] == ["1.0"] * 6 + ["2.0"]


def write_side_logs(run_dir: Path) -> None:
    for step, stage in ((100, 1), (200, 2), (300, 3)):
        append_jsonl(run_dir / "transitions.jsonl", {"step": step, "stage": stage, "note": "中"})
    for step in (150, 200, 250, 300):
        append_jsonl(run_dir / "expert_load.jsonl", {"step": step, "layers": {"1": [0.5, 0.5]}})
    for name in ("step-00000200.json", "step-00000300.json", "final.json"):
        (run_dir / "eval").mkdir(exist_ok=True)
        (run_dir / "eval" / name).write_text("{}")


@pytest.mark.parametrize(("stage", "kept"), [(1, [100]), (2, [100, 200]), (None, [100, 200])])
def test_resume_takes_the_other_logs_back_too(tmp_path: Path, stage: int | None, kept: list[int]) -> None:
    write_side_logs(tmp_path)
    old = logs_of(tmp_path)
    RunLog(tmp_path).resume_at(200, stage)
    assert [record["step"] for record in read_jsonl(tmp_path / "transitions.jsonl")] == kept
    assert [record["step"] for record in read_jsonl(tmp_path / "expert_load.jsonl")] == [150, 200]
    assert old["transitions.jsonl"].startswith((tmp_path / "transitions.jsonl").read_bytes())  # to the byte
    assert (tmp_path / "transitions.until-step-00000300.jsonl").read_bytes() == old["transitions.jsonl"]
    assert (tmp_path / "expert_load.until-step-00000300.jsonl").read_bytes() == old["expert_load.jsonl"]
    names = {path.name for path in (tmp_path / "eval").iterdir()}
    assert names == {"step-00000200.json", "step-00000300.json.superseded", "final.json"}


@pytest.mark.parametrize("fatal", range(1, 12))
def test_a_death_at_any_rename_of_a_resume_loses_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int
) -> None:
    write_steps(tmp_path, 100, 200, 300)
    write_side_logs(tmp_path)
    old = logs_of(tmp_path)
    calls = iter(range(1, 100))
    replace = os.replace

    def replace_or_die(source: Any, target: Any) -> None:
        if next(calls) == fatal:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", replace_or_die)
        try:
            RunLog(tmp_path).resume_at(200, 2)
        except KeyboardInterrupt:
            assert set(old.values()) <= set(logs_of(tmp_path).values())
    RunLog(tmp_path).resume_at(200, 2)
    assert set(old.values()) <= set(logs_of(tmp_path).values())
    assert [row["step"] for row in rows_of(tmp_path)] == ["100", "200"]
    assert [record["step"] for record in read_jsonl(tmp_path / "transitions.jsonl")] == [100, 200]


def test_lightning_logs_into_one_row_per_step(tmp_path: Path) -> None:
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = (self.weight * batch.float()).mean()
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", batch.float().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=1)
    trainer = pl.Trainer(
        max_steps=6, logger=RunLog(tmp_path), log_every_n_steps=2, val_check_interval=3, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Model(), loader, loader)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "5"]
    assert set(rows[-1]) == {"step", "train/loss", "val/loss"}
    assert trainer.log_dir == str(tmp_path) and list((tmp_path / "checkpoints").iterdir())


def test_the_log_travels_to_another_process(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.log_metrics({"loss": 1.0}, 0)
    copy = pickle.loads(pickle.dumps(log))
    copy.log_metrics({"loss": 2.0}, 1)
    copy.finalize("success")
    assert len(rows_of(tmp_path)) == 2


records = st.dictionaries(
    st.text(max_size=5),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5),
    max_size=4,
)


@settings(deadline=None)
@given(items=st.lists(records, min_size=1, max_size=6), lost=st.integers(1, 40))
def test_jsonl_reads_back_and_survives_a_torn_last_line(items: list[Any], lost: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    for item in items:
        append_jsonl(path, item)
    assert read_jsonl(path) == items
    last = len(path.read_bytes().rstrip(b"\n").rsplit(b"\n", 1)[-1]) + 1
    lost = min(lost, last)
    os.truncate(path, path.stat().st_size - lost)
    kept = items if lost == 1 else items[:-1]  # without its newline alone, a record is still whole
    assert read_jsonl(path) == kept
    append_jsonl(path, {"next": 1})
    assert read_jsonl(path) == [*kept, {"next": 1}]


def test_jsonl_values(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    append_jsonl(
        path, {"tensor": torch.tensor([1.0, float("nan")]), "n": np.int64(3), "x": float("inf"), "text": "中", 1: (2,)}
    )
    assert json.loads(path.read_text("utf-8")) == {"tensor": [1.0, None], "n": 3, "x": None, "text": "中", "1": [2]}
    assert "中" in path.read_text("utf-8")
    with pytest.raises(TypeError):
        append_jsonl(path, {"path": path})
    assert len(read_jsonl(path)) == 1 and read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("line", [b"[1, 2]\n", b'{"a": 1\n', b"\xff\xfe\n"])
def test_a_broken_line_inside_a_log_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'{"a": 2}\n')
    with pytest.raises(InputError, match=r"log\.jsonl line 2 is not a JSON object"):
        read_jsonl(path)
