"""Configurations refuse what cannot be built, in one line that names the values."""

import dataclasses

import pytest

from modules.config import ModelConfig, RopeScaling, describe_differences
from modules.errors import InputError
from modules.functional.flops import count_parameters, expert_rows_per_token, training_flops_per_token
from modules.functional.schedule import Pace, ScheduleConfig, learning_rate_factor
from modules.layers.transformer import Transformer
from modules.moe_config import CapacityConfig, MoEConfig, RouterConfig
from modules.optim import OptimizerConfig


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": -4}, "dim=-4"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dim": 100, "num_heads": 3}, "dim=100 is not divisible by num_heads=3; choose num_heads=2"),
        ({"dim": 96, "num_heads": 4, "num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"dim": 96, "num_heads": 4, "head_dim": 5}, "head_dim=5 is odd"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"dim": 100, "num_heads": 2, "moe": MoEConfig()}, "dim=100 of a routed layer is not a multiple of 8"),
        ({"num_layers": 2, "moe": MoEConfig(every=3)}, "names no layer"),
        ({"num_layers": 2, "moe": MoEConfig(layers=(5,))}, "layers=(5,)"),
    ],
)
def test_model_config_refuses(change: dict, words: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig(**{"vocab_size": 64, **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_top_k_over_experts() -> None:
    with pytest.raises(InputError, match="top_k=9 is more than num_experts=8"):
        MoEConfig(num_experts=8, top_k=9)


@pytest.mark.parametrize("field", [{"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
def test_optimizer_config_refuses(field: dict) -> None:
    with pytest.raises(InputError):
        OptimizerConfig(**field)


def test_dictionary_round_trip() -> None:
    config = ModelConfig(vocab_size=64, moe=MoEConfig(layers=(1, 3)))
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("moe", [None, MoEConfig(num_experts=4, top_k=2, every=2), MoEConfig(4, 1, expert_dim=16)])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"qkv_bias": True, "qk_norm": True, "num_kv_heads": 1, "head_dim": 12},
        {
            "o_bias": True,
            "qk_norm": True,
            "qk_norm_scope": "projection",
            "num_kv_heads": 2,
            "norm_structure": "postnorm",
        },
        {"norm_structure": "hybridnorm"},
    ],
)
def test_parameter_count_is_the_network(tied: bool, moe: MoEConfig | None, extra: dict) -> None:
    config = ModelConfig(vocab_size=50, dim=32, num_layers=3, num_heads=4, tie_embeddings=tied, moe=moe, **extra)
    network = Transformer(config)
    count = count_parameters(config)
    assert count.total == sum(p.numel() for p in network.parameters())
    expert = sum(p.numel() for n, p in network.named_parameters() if ".experts." in n)
    unused = 0 if moe is None else expert * (moe.num_experts - moe.top_k) // moe.num_experts
    assert count.active == count.total - unused


def test_rope_scaling_goes_through_records_and_is_checked() -> None:
    config = ModelConfig(vocab_size=9, rope_scaling=RopeScaling("llama3", 32.0))
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match=r"high_freq_factor=1\.0 must be more than"):
        RopeScaling("llama3", 8.0, high_freq_factor=1.0)
    with pytest.raises(InputError, match=r"rope_scaling\.factor=0\.0"):
        RopeScaling("linear", 0.0)


def test_families_have_their_sizes() -> None:
    sizes = {"nano": (144, 4, 3), "micro": (240, 8, 5), "tiny": (384, 12, 8)}
    for (dim, layers, heads), want in zip(sizes.values(), (1e6, 5.5e6, 21e6), strict=True):
        count = count_parameters(ModelConfig(vocab_size=16384, dim=dim, num_layers=layers, num_heads=heads))
        assert count.non_embedding == pytest.approx(want, rel=0.02)
        gains = dim * (2 * layers + 1)
        assert count.non_embedding - gains == 12 * layers * dim**2


def test_schedules() -> None:
    wsd = ScheduleConfig("wsd", warmup_steps=10, decay_fraction=0.2, final_ratio=0.1)
    factors = [learning_rate_factor(step, Pace(100), wsd) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    cosine = ScheduleConfig("cosine", warmup_steps=0, final_ratio=0.0)
    assert learning_rate_factor(50, Pace(100), cosine) == pytest.approx(0.5)
    assert learning_rate_factor(100, Pace(100), cosine) == pytest.approx(0.0)
    assert learning_rate_factor(10**6, 100, ScheduleConfig("constant")) == 1.0
    with pytest.raises(InputError, match="warmup_steps=10 is not below the run's 10 steps"):
        wsd.check_total(10)


def test_flops_count_empty_slots() -> None:
    base = ModelConfig(vocab_size=64, num_layers=2, moe=MoEConfig(4, 2))
    roomy = dataclasses.replace(base, moe=MoEConfig(4, 2, capacity=CapacityConfig(factor=4.0)))
    assert expert_rows_per_token(base, 16) == 2 and expert_rows_per_token(roomy, 16) == 4
    expert = 3 * base.dim * base.expert_size
    extra = training_flops_per_token(roomy, 16) - training_flops_per_token(base, 16)
    assert extra == 6 * 2 * 2 * expert  # two layers, two rows more for each token
    assert CapacityConfig(factor=9.0).slots(8, 4) == 8  # an expert never has more slots than a group has tokens


def test_architectures_differ_by_what_is_stored() -> None:
    first = ModelConfig(vocab_size=64, moe=MoEConfig(4, 2))
    heavier = dataclasses.replace(first, moe=MoEConfig(4, 2, balance_loss_weight=1.0, balance_level="global"))
    biased = dataclasses.replace(first, moe=MoEConfig(4, 2, router=RouterConfig(bias_update_rate=1e-3)))
    assert describe_differences(first, heavier) == ""
    assert describe_differences(first, biased) == "moe.router.selection_bias False / True"
    assert describe_differences(first, dataclasses.replace(first, moe=MoEConfig(4, 1))) == "moe.top_k 2 / 1"
    assert "moe None / set" in describe_differences(dataclasses.replace(first, moe=None), first)
    assert first.trained_like(heavier) == heavier
