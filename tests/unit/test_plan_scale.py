"""Many processes without any: shards, warnings, times, and the command."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from app.cli import main
from app.scale.estimate import ScaleEstimate, estimate
from app.scale.hardware import Hardware
from app.scale.memory import rank_memory
from app.scale.shards import Shards, fake_world, shards_of
from app.scale.workload import Workload
from app.strategies.layout import Layout
from app.strategies.parallelize import Wrapping
from benchmarks.scale import read_model
from modules.config import ModelConfig
from modules.functional.flops import count_parameters
from modules.moe_config import CapacityConfig, MoEConfig
from tests.end_to_end import runs

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocab_size": 128, "dim": 64, "num_layers": 6, "num_heads": 8, "ffn_dim": 128}
MOE = MoEConfig(num_experts=16, top_k=2, every=3)
CONFIGS = {
    "dense": ModelConfig(**SHAPE, qk_norm=True, norm_structure="hybridnorm"),
    "tied": ModelConfig(**SHAPE, qkv_bias=True, tie_embeddings=True),
    "experts": ModelConfig(**SHAPE, moe=MOE),
    "all routed": ModelConfig(**SHAPE, moe=replace(MOE, every=1, num_shared_experts=2, shared_gate=True)),
}


def held_by(config: ModelConfig, layout: Layout, rank: int) -> Shards:
    with fake_world(rank, layout.world_size):
        return shards_of(config, layout, rank, is_muon=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_block_of_each_kind_stands_for_all(name: str) -> None:
    shards = held_by(CONFIGS[name], Layout(dp_shard=2), 0)
    assert shards.whole_numel == count_parameters(CONFIGS[name]).total


@pytest.mark.parametrize("layout", [Layout(2, 2, ep=2, tp=2), Layout(1, 8, ep=4), Layout(2, 3), Layout(tp=4)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_ranks_hold_everything_between_them(name: str, layout: Layout) -> None:
    ranks = [held_by(CONFIGS[name], layout, rank) for rank in range(layout.world_size)]
    for parts in zip(*(shards.each() for shards in ranks), strict=True):
        held = parts[0][1]
        assert sum(part.local_numel for _, part in parts) == held.numel * held.copies, held.name
        assert max(part.local_numel for _, part in parts) == held.local_numel, held.name
        assert min(part.local_numel for _, part in parts) == parts[-1][1].local_numel, held.name


def look(config: ModelConfig, layout: Layout, hardware: Hardware = Hardware(), **work: object) -> ScaleEstimate:
    return estimate(Workload(config, layout, 2, 64, **work), hardware)  # type: ignore[arg-type]


def test_a_good_layout_of_a_large_model_draws_no_warning() -> None:
    moe = MoEConfig(num_experts=64, top_k=2, every=4, capacity=CapacityConfig(2.0))
    config = ModelConfig(32768, dim=4096, num_layers=32, num_heads=32, ffn_dim=10944, moe=moe)
    work = Workload(config, Layout(64, 64, ep=8), 4, 4096, Wrapping("full"))
    found = estimate(work, Hardware())
    assert found.warnings == [] and found.ratio_to_even < 1.05
    assert 0.2 * found.compute_seconds < found.hidden_seconds < found.compute_seconds < found.step_seconds


@pytest.mark.parametrize("world_size", [64, 4096])
@pytest.mark.parametrize("name", [path.stem for path in sorted(ROOT.glob("configs/model/*b.yaml"))])
def test_large_models_are_shared_out_evenly(name: str, world_size: int) -> None:
    config = read_model(name, vocab_size=32768)
    layout = Layout(world_size // 64, 64, ep=1 if config.moe is None else 8)
    with fake_world(0, world_size):
        shards = shards_of(config, layout, 0)
    assert shards.numel * 64 <= 1.05 * shards.whole_numel == 1.05 * count_parameters(config).total


@pytest.mark.parametrize(
    ("config", "layout", "work", "told"),
    [
        (CONFIGS["experts"], Layout(dp_shard=4), {}, "set ep=4"),
        (CONFIGS["experts"], Layout(dp_shard=37), {}, "uneven shards"),
        (CONFIGS["experts"], Layout(dp_shard=256), {}, "empty shards"),
        (replace(CONFIGS["dense"], vocab_size=1001), Layout(tp=2), {}, "unsplit: embedding.weight [1001, 64] is held"),
        (CONFIGS["dense"], Layout(dp_shard=64), {}, "communication bound"),
        (CONFIGS["dense"], Layout(dp_shard=2), {"hardware": Hardware(memory_bytes=1e6)}, "too large"),
        (CONFIGS["dense"], Layout(dp_shard=2), {"hardware": Hardware(memory_bytes=1e6), "accumulate": 2}, "accumul"),
        (CONFIGS["dense"], Layout(dp_shard=2), {"hardware": Hardware(memory_bytes=1e6)}, "autocast: casts"),
        (
            CONFIGS["dense"],
            Layout(dp_shard=2),
            {"hardware": Hardware(memory_bytes=1e5), "is_muon": True},
            "muon: every rank",
        ),
    ],
)
def test_what_is_wrong_is_told(config: ModelConfig, layout: Layout, work: dict[str, object], told: str) -> None:
    warnings = look(config, layout, **work).warnings  # type: ignore[arg-type]
    assert any(told in line for line in warnings), warnings


def test_state_is_counted_with_one_moment_under_muon_and_whole_gradients_while_they_accumulate() -> None:
    layout, config = Layout(dp_shard=4), CONFIGS["experts"]
    shards, work = held_by(config, layout, 0), Workload(config, layout, 2, 64)
    plain = rank_memory(work, shards)
    assert plain.parameters == plain.gradients == 4 * shards.numel and plain.optimizer == 2 * plain.parameters
    muon = rank_memory(replace(work, is_muon=True), shards)
    assert plain.optimizer - muon.optimizer == 4 * shards.muon_numel > 0
    added = rank_memory(replace(work, accumulate=2), shards).gradients - plain.gradients
    assert added == 4 * shards.numel * 4  # all ranks' parts, which are even here


def test_seconds_of_a_ring_and_of_an_exchange() -> None:
    hardware = Hardware(intra_bandwidth=400.0, inter_bandwidth=50.0, devices_per_node=8)
    assert hardware.seconds(800, ranks=8, stride=1) == 2  # inside a node
    assert hardware.seconds(800, ranks=16, stride=1) == 2  # eight connections carry the ring
    assert hardware.seconds(800, ranks=16, stride=8) == 16  # one does
    assert hardware.seconds(800, ranks=16, stride=2) == 4
    assert hardware.seconds(1500, ranks=16, stride=1, is_all_to_all=True) == pytest.approx(800 / 50)  # 8 of 15 leave


def test_young_s_interval_between_checkpoints() -> None:
    hardware = Hardware(storage_bandwidth=1e6, device_mtbf=2.0)
    found = look(CONFIGS["dense"], Layout(dp_shard=4), hardware=hardware)
    size = 3 * 4 * count_parameters(CONFIGS["dense"]).total  # weights and two moments in float32
    assert found.save_seconds == pytest.approx(size / 4 / 1e6)
    assert found.save_interval == pytest.approx((2 * found.save_seconds * 2 * 3600 / 4) ** 0.5)
    gathered = look(CONFIGS["dense"], Layout(dp_shard=4), hardware=hardware, is_gathered=True)
    assert gathered.save_seconds == pytest.approx(4 * found.save_seconds)


def test_presets_are_read_and_h100_is_the_default() -> None:
    presets = {path.stem: yaml.safe_load(path.read_text())["hardware"] for path in ROOT.glob("configs/hardware/*.yaml")}
    assert Hardware(**presets["h100"]) == Hardware() and {"a100", "h200"} < presets.keys()
    assert Hardware(**presets["a100"]).peak_flops < Hardware(**presets["h200"]).peak_flops


def test_the_command_plans_for_processes_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = runs.settings(tmp_path / "run", tmp_path / "world", accelerator="gpu", devices=8, num_nodes=4)
    path = str(runs.write(config, tmp_path / "c.yaml"))
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", path, "--world_size", "8"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and not (tmp_path / "run").exists()
    assert shown.count("│ 1, 8, 1, 1 ") == 3  # of every stage
    assert "each of 8 ranks" in shown and "warning, stage 3" in shown and "16 wide, 2 layers" in shown
    strategy = {"class_path": "app.strategies.ExpertParallelStrategy", "init_args": {"ep": "auto", "dp_replicate": 2}}
    config["trainer"]["strategy"] = strategy
    path = str(runs.write(config, tmp_path / "ep.yaml"))
    with pytest.raises(SystemExit):
        main(["plan", "--config", path, "--world_size", "16", "--hardware.mfu", "0.5"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ 2, 8, 1, 1 │ 2, 8, 1, 1 │ 2, 8, 4, 1 │" in shown
    assert "MFU 50%" in shown


@pytest.mark.parametrize(
    ("world_size", "tp", "told"),
    [
        ("9", "2", "no factorisation of 9 processes"),
        ("8", "8", "does not divide num_heads=2"),
        ("0", "1", "at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    world_size: str, tp: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"class_path": "app.strategies.ExpertParallelStrategy", "init_args": {"tp": int(tp)}}
    config = runs.settings(tmp_path / "run", tmp_path / "world", strategy=arguments)
    with pytest.raises(SystemExit) as refused:
        main(["plan", "--config", str(runs.write(config, tmp_path / "c.yaml")), "--world_size", world_size])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and told in error and error.count("\n") == 1
