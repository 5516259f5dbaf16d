"""Rounds and flags of the benchmarks."""

import argparse

import pytest
import torch

from benchmarks import timing


def flags(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    timing.add_common_flags(parser, rounds=5, repeats=1)
    return parser.parse_args(words)


def test_rounds_before_those_that_count() -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in ("one", "other")}
    turns = timing.interleave(runs, flags("--rounds", "3", "--warm_up", "2"), lambda: None, settle=False)
    assert sorted(calls) == ["one"] * 5 + ["other"] * 5
    assert {name: len(times) for name, times in turns.seconds.items()} == {"one": 3, "other": 3}
    assert {name: len(faults) for name, faults in turns.faults.items()} == {"one": 3, "other": 3}


@pytest.mark.parametrize("words", [("--rounds", "0"), ("--warm_up", "-1"), ("--repeats", "0"), ("--threads", "0")])
def test_counts_that_mean_nothing_are_refused(words: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flags(*words)
    assert end.value.code == 2
    assert f"argument {words[0]}: {words[1]} is below" in capsys.readouterr().err


def test_a_quarter_of_the_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 400))
    assert timing.has_room(74, "cuda") and not timing.has_room(76, "cuda")
    assert timing.has_room(2**20, "cpu") and not timing.has_room(2**60, "cpu")
