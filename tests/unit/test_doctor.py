"""`growmoe doctor`: what it finds, what it says of it, and its exit codes."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from app.cli import main
from app.doctor import collectives, devices, ranks, storage, versions
from app.doctor.place import Place, place_of
from app.doctor.ranks import Facts
from modules.errors import InputError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables, and no measurements."""
    for name in [*TORCHRUN, *SLURM]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "measure_rates", lambda device: devices.Rates(8e10, 8e10))
    return monkeypatch


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_alone(alone: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    main(["doctor", "--run_dir", str(tmp_path / "runs" / "new"), "--output", str(output)])
    text = capsys.readouterr().out
    assert all(title in text for title in ("Versions", "Devices", "Ranks: 1", "Files")) and "broken" not in text
    found = json.loads(output.read_text())
    assert found["ok"] and found["ranks"][0]["rank"] == 0
    assert any(row["what"] == "torch" and row["version"] == torch.__version__ for row in found["sections"][0]["rows"])
    assert list(tmp_path.iterdir()) == [output]


def test_something_broken(alone: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone.setattr(storage, "sync_file", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--run_dir", str(tmp_path)])
    assert end.value.code == 1
    assert f"broken: no file can be written in {tmp_path}: No space left on device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**TORCHRUN, "RANK": "four"}, [], "RANK='four' is not a whole number"),
        ({**TORCHRUN, "RANK": "4"}, [], "RANK=4 is not below WORLD_SIZE=4"),
        ({}, ["--seconds", "0"], "seconds=0.0 must be"),
        ({}, ["--config", "no.yaml"], "config=no.yaml is no file"),
        ({}, ["--output", "no/such/folder.json"], "lies in a folder that does not exist"),
    ],
)
def test_wrong_input(
    environment: dict[str, str],
    options: list[str],
    message: str,
    alone: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        alone.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["doctor", *options])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come(rank: str, alone: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    for name, value in {**TORCHRUN, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        alone.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--timeout", "1"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert f"rank {rank} on " in error and f"WORLD_SIZE=4 at 127.0.0.1:{port} within 1 s" in error


# -- its parts ---------------------------------------------------------------------------------------------------------


def test_place_of_a_process() -> None:
    assert place_of({}) == Place()
    assert place_of(TORCHRUN) == Place(1, 4, 1, "a", 29500, "the environment")
    assert place_of({**TORCHRUN, "TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    assert place_of(SLURM) == Place(9, 16, 1, "gpu07", 18456, "Slurm")
    assert place_of({**SLURM, "SLURM_JOB_NAME": "interactive"}) == Place()
    with pytest.raises(InputError, match="SLURM_LOCALID='' is not a whole number"):
        place_of({**SLURM, "SLURM_LOCALID": ""})


def test_versions_out_of_range() -> None:
    installed = versions.installed_versions()
    assert not versions.check_versions(installed).problems
    problems = versions.check_versions({**installed, "lightning": "2.6.3"}).problems
    assert [p.what for p in problems] == ["lightning 2.6.3 is not in the supported range <2.7,>=2.6.4"]
    assert problems[0].is_broken and problems[0].fix.startswith('pip install "lightning<2.7')
    del installed["wandb"]
    assert [p.what for p in versions.check_versions(installed).problems] == ["wandb is not installed"]


def test_slow_bf16_is_told() -> None:
    section = devices.check_devices(torch.device("cpu"), devices.Rates(9e10, 1.5e9))
    (problem,) = (p for p in section.problems if "bf16" in p.what)
    assert "60.0 times" in problem.what and not problem.is_broken
    rates = devices.measure_rates(torch.device("cpu"))
    assert rates.fp32 > 1e8 and rates.bf16 > 1e7


def test_processors_are_described() -> None:
    cpuinfo = "model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_bf16\n"
    assert devices.describe_processors(cpuinfo).startswith("Some CPU, avx2 avx512f amx_bf16, ")


def facts(rank: int, **changes: Any) -> Facts:
    found = Facts(
        rank, rank % 2, f"host{rank // 2}", f"cuda:{rank % 2} NVIDIA H200 GPU-{rank}", {"torch": "2.13"}, 4, 16
    )
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"versions": {"torch": "2.12"}}, ["torch is 2.12 on ranks 3, else 2.13"]),
        ({"config": "ab"}, ["the digest of --config is ab on ranks 3, else "]),
        ({"device": "cuda:0 NVIDIA H200 GPU-2"}, ["2 ranks on host1 share cuda:0 NVIDIA H200 GPU-2"]),
        ({"local_rank": 0}, ["ranks on host1 have the same LOCAL_RANK"]),
        ({"threads": 16}, ["2 ranks on host1 use 20 threads on 16 cores"]),
        ({"rates": devices.Rates(1e12, 1e12)}, ["ranks 3 multiply matrices at less than 70% of the median speed"]),
    ],
)
def test_ranks_that_differ(changes: dict[str, Any], expected: list[str]) -> None:
    usual = {"rates": devices.Rates(2e12, 2e12)}
    everyone = [facts(0, **usual), facts(1, **usual), facts(2, **usual), facts(3, **{**usual, **changes})]
    section = ranks.check_ranks(everyone, Place(0, 4, 0, "a", 1, "torchrun"))
    assert [problem.what for problem in section.problems] == expected
    assert section.rows[0][:3] == ("host0", "0-1", "0-1") and "2 x NVIDIA H200" in section.rows[0]


def test_groups_within_and_across_hosts() -> None:
    assert collectives.groups_of(["a", "a"]) == {"all ranks": [[0, 1]]}
    assert collectives.groups_of(["a", "b"]) == {"all ranks": [[0, 1]]}
    assert collectives.groups_of(["a", "a", "b", "b", "c"]) == {
        "all ranks": [[0, 1, 2, 3, 4]],
        "within a host": [[0, 1], [2, 3]],
        "across hosts": [[0, 2, 4]],
    }


def test_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = storage.check_storage(tmp_path / "new" / "run", 1, 0)
    assert dict(section.rows)["run directory"].endswith(f"to be made in {tmp_path}") and not list(tmp_path.iterdir())
    monkeypatch.setattr(storage, "LITTLE_SPACE", 2**62)
    monkeypatch.setattr(storage, "_kind", lambda folder: "tmpfs")
    what = [problem.what for problem in storage.check_storage(tmp_path, 1, 0).problems]
    assert len(what) == 2 and "MiB left" in what[0] and "tmpfs" in what[1]


# -- on several ranks --------------------------------------------------------------------------------------------------


def _join(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=3)
    cpu = torch.device("cpu")
    section = collectives.check_collectives(cpu, ["a", "a", "b"], seconds=0.1)
    if rank == 1:  # one that adds nothing: its share of the sum is missing
        broken = collectives.OPERATIONS["all-reduce"]
        wrong = replace(broken, run=lambda output, given, group: broken.run(output, given * 0, group))
        collectives.OPERATIONS["all-reduce"] = wrong
    planted = collectives.check_collectives(cpu, ["a", "a", "b"], seconds=0.1)
    there = storage.check_storage(folder, 3, rank)
    if rank == 2:
        storage._sees = lambda mark: False
    blind = storage.check_storage(folder, 3, rank)
    found = {"sections": [each.to_dict() for each in (section, planted, there, blind)]}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def test_collectives_and_files_of_three_ranks(tmp_path: Path) -> None:
    mp.start_processes(_join, args=(free_port(), tmp_path), nprocs=3, start_method="fork")
    for rank in range(3):
        right, planted, there, blind = json.loads((tmp_path / f"{rank}.json").read_text())["sections"]
        assert not right["problems"] and len(right["rows"]) == 12
        assert {row["result"] for row in right["rows"]} == {"right"}
        assert all(float(value) > 0 for row in right["rows"] for name, value in row.items() if "GB/s" in name)
        wrong = [(row["operation"], row["among"]) for row in planted["rows"] if row["result"] == "wrong"]
        assert wrong == [("all-reduce", "all ranks"), ("all-reduce", "within a host")]
        assert not [p for p in there["problems"] if "do not see" in p["what"]]
        assert f"ranks [2] do not see a file that rank 0 wrote in {tmp_path}" in [p["what"] for p in blind["problems"]]
