"""Routing figures of two processes are those of one process on all of the data."""

import json
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.expert_load import ExpertLoad
from modules.routing_metrics import RoutingLoad
from tests.unit.test_expert_load import Run, config, watched

RANKS, STEPS, ACCUMULATE, LAYERS, EXPERTS, TOP_K, TOKENS = 2, 6, 2, 3, 4, 2, 8
LOGGED = [2, 4, 6]


def micro_batch(step: int, part: int, rank: int) -> dict[str, torch.Tensor]:
    """One micro-batch of one rank; layer 2 has an expert that only rank 1 uses, and one that nobody uses."""
    random = torch.Generator().manual_seed(100 * step + 10 * part + rank)
    counts = torch.randint(1, 9, (LAYERS, EXPERTS), generator=random)
    counts[2, 3] = 0
    counts[2, 0] *= rank
    drawn = torch.rand(LAYERS, TOP_K + 2, generator=random, dtype=torch.float64)
    figures = {"dropped_NK": drawn[:, :TOP_K], "entropy_N": drawn[:, -2], "logit_rms_N": drawn[:, -1]}
    scalars = {"balance_loss": drawn.sum(), "z_loss": drawn.mean()}
    return watched(counts.tolist()) | figures | scalars


def train(run_dir: Path, ranks: list[int]) -> dict[str, Any]:
    """Train as these ranks at once: what was logged and warned, and the callback's state."""
    callback = ExpertLoad(collapse_window=2, warn_max_over_ideal=3.0)
    run = Run(run_dir, callback, config(LAYERS), accumulate=ACCUMULATE * len(ranks))
    run.trainer.log_every_n_steps = 2
    run.trainer.is_global_zero = 0 in ranks
    for step in range(STEPS):
        for part in range(ACCUMULATE):
            run.feed(*(micro_batch(step, part, rank) for rank in ranks))
    return {"logged": run.logged, "warned": run.warned, "state": callback.state_dict()}


def work(rank: int, folder: Path) -> None:
    """One of two processes."""
    torch.set_num_threads(1)
    rank_zero_only.rank = rank
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    metric = RoutingLoad(LAYERS, EXPERTS, TOP_K)
    for part in range(ACCUMULATE + rank):  # ranks need not have equally many
        metric.update(micro_batch(0, part, rank), TOKENS * (1 + part))
    figures, local = metric.compute(), metric.tokens_per_expert_NE
    found = {"figures": figures, "local": local} | train(folder / f"rank-{rank}", [rank])
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes that have met, and what each of them has seen."""
    folder = tmp_path_factory.mktemp("two")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=work, args=(rank, folder), daemon=True) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * RANKS
    return folder, [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_the_metric_sums_over_ranks(found: tuple[Path, list[dict[str, Any]]]) -> None:
    whole = RoutingLoad(LAYERS, EXPERTS, TOP_K)
    for rank in range(RANKS):
        for part in range(ACCUMULATE + rank):
            whole.update(micro_batch(0, part, rank), TOKENS * (1 + part))
    want = whole.compute()
    for process in found[1]:
        assert process["figures"].keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(process["figures"][name], value, rtol=1e-10, atol=1e-10, msg=name)
    local = sum(process["local"] for process in found[1])  # each goes on adding to its own
    assert torch.equal(local, want["tokens_per_expert_NE"])


def test_the_callback_logs_the_union_on_every_rank_and_writes_on_one(
    found: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    want = train(tmp_path, list(range(RANKS)))
    folder, processes = found
    for process in processes:
        assert list(process["logged"]) == LOGGED
        for step in LOGGED:
            assert process["logged"][step] == pytest.approx(want["logged"][step], abs=1e-10)
        assert process["logged"][2]["moe/layer_02/dead_fraction"] == 0.25  # rank 0 alone has 0.5
        torch.testing.assert_close(process["state"], want["state"])
    shares = [path.read_text() for path in folder.glob("rank-*/expert_load.jsonl")]
    assert len(shares) == 1
    written = [json.loads(line) for line in shares[0].splitlines()]
    expected = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [record["layers"] for record in written] == [record["layers"] for record in expected]


def test_collapse_is_told_by_one_rank(found: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = train(tmp_path, list(range(RANKS)))["warned"]
    first, second = found[1]
    assert list(want) == [4] and "layer 2: 1 of 4 experts" in want[4][0]
    assert first["warned"] == want and not second["warned"]
