"""Degrees of parallelism: every mistake is one clear line with the choices that work, before processes meet."""

from dataclasses import replace

import pytest

from app.strategies.layout import Layout, resolve_layout
from modules.config import ModelConfig
from modules.errors import InputError
from modules.moe_config import MoEConfig

DENSE = ModelConfig(64, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, ffn_dim=48)
MIXTURE = ModelConfig(64, dim=32, num_layers=2, num_heads=8, num_kv_heads=4, moe=MoEConfig(12, expert_dim=24))


@pytest.mark.parametrize(
    ("world_size", "degrees", "expected"),
    [
        (1, {}, Layout()),
        (8, {}, Layout(1, 8)),
        (8, {"ep": 4, "tp": 2}, Layout(1, 4, 4, 2)),
        (8, {"dp_replicate": "auto", "dp_shard": 2, "tp": 2}, Layout(2, 2, 1, 2)),
        (8, {"dp_shard": 1, "tp": "auto"}, Layout(1, 1, 1, 8)),
        (24, {"ep": "auto"}, Layout(1, 24, 1, 1)),
    ],
)
def test_auto_takes_what_is_left(world_size: int, degrees: dict[str, int], expected: Layout) -> None:
    assert resolve_layout(world_size, **degrees) == expected
    assert expected.world_size == world_size


@pytest.mark.parametrize(("world_size", "ep"), [(24, 12), (8, 4), (5, 1), (1, 1)])
def test_automatic_expert_parallelism_divides_experts_and_processes(world_size: int, ep: int) -> None:
    assert resolve_layout(world_size, ep="auto", config=MIXTURE).ep == ep
    assert resolve_layout(world_size, ep="auto", config=DENSE).ep == 1


@pytest.mark.parametrize(
    ("world_size", "degrees", "words"),
    [
        (8, {"dp_shard": 3, "tp": 2}, "no factorisation of 8 processes"),
        (6, {"tp": 4}, "no factorisation of 6 processes"),
        (8, {"dp_shard": 2}, "no factorisation of 8 processes"),
        (8, {"ep": 3}, "choose ep from 1, 2, 4, 8"),
        (8, {"dp_replicate": "auto"}, "dp_replicate and dp_shard are both auto"),
        (8, {"tp": 0}, "tp=0 must be at least 1"),
    ],
)
def test_degrees_that_are_no_factorisation(world_size: int, degrees: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolve_layout(world_size, **degrees)


@pytest.mark.parametrize(
    ("layout", "config", "words"),
    [
        (Layout(1, 8, ep=8), MIXTURE, "ep=8 does not divide num_experts=12; choose ep from 1, 2, 4"),
        (Layout(tp=8), DENSE, "tp=8 does not divide num_kv_heads=4; choose tp from 1, 2, 4"),
        (Layout(tp=3), DENSE, "tp=3 does not divide num_heads=8"),
        (Layout(tp=2), ModelConfig(64, dim=32, num_heads=8, ffn_dim=49), "tp=2 does not divide ffn_dim=49"),
        (Layout(tp=2), replace(MIXTURE, moe=MoEConfig(4, expert_dim=24)), "cuts expert_dim=24 into 12"),
        (Layout(tp=2), ModelConfig(64, dim=32, num_heads=8, qk_norm=True, qk_norm_scope="projection"), "qk_norm_scope"),
    ],
)
def test_layouts_that_do_not_fit_a_model(layout: Layout, config: ModelConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        layout.check(config)


def test_ranks_that_share_samples_are_next_to_each_other() -> None:
    layout = Layout(2, 4, 2, 2)
    assert (layout.world_size, layout.data_ranks, layout.efsdp) == (16, 8, 2)
