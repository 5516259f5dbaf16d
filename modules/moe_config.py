"""The shape of routing: which layers have experts, how tokens choose them, and how many an expert takes.

Letters: E experts, K experts per token, F hidden width of an expert, S tokens per group, C slots of an expert.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from modules.errors import InputError, require_not_negative, require_positive

TRAINING_SETTINGS = frozenset(
    {"balance_loss_weight", "z_loss_weight", "balance_level", "aux_reduction", "at_evaluation", "bias_update_rate"}
)
"""Fields that may change when a run is resumed: what is stored does not depend on them, but on having a bias."""


@dataclass(frozen=True)
class RouterConfig:
    """How logits become choices and gates."""

    kind: Literal["top_k", "gshard", "expert_choice"] = "top_k"
    """top_k: a token takes its k best experts; gshard: greedy top-2 with groups and capacity, as in GShard and axlearn;
    expert_choice: an expert takes its best tokens, which sees later tokens and is for training only"""
    score: Literal["softmax", "softmax_of_top_k", "sigmoid"] = "softmax"
    """softmax over all experts, softmax over the chosen ones, or a sigmoid of each logit"""
    soft_cap: float | None = None
    """logits are squeezed into (-c, c) by c tanh(logit / c); empty: no cap"""
    gate_scale: float = 1.0
    """factor on all gates (DeepSeek-V3 has 2.5)"""
    bias_update_rate: float = 0.0
    """after each optimizer step a bias on each expert's score, for the choice only, moves by this much towards an even
    load (DeepSeek-V3 has 0.001); 0: no bias"""
    expert_groups: int = 1
    """experts stand in this many groups, and a token chooses groups first (DeepSeek-V3)"""
    top_groups: int = 1
    """groups that a token may choose experts from"""

    def __post_init__(self) -> None:
        numbers: dict[str, int | float] = {"expert_groups": self.expert_groups, "top_groups": self.top_groups}
        numbers["gate_scale"] = float(self.gate_scale)
        if self.soft_cap is not None:
            numbers["soft_cap"] = float(self.soft_cap)
        require_positive(**{f"router.{name}": value for name, value in numbers.items()})
        require_not_negative(**{"router.bias_update_rate": self.bias_update_rate})
        if self.top_groups > self.expert_groups:
            raise InputError(
                f"router.top_groups={self.top_groups} is more than router.expert_groups={self.expert_groups}; "
                f"choose top_groups <= {self.expert_groups}"
            )


@dataclass(frozen=True)
class CapacityConfig:
    """How many tokens an expert takes at most. Slots are counted within groups of tokens."""

    factor: float = 2.0
    """an expert has group_size * factor / num_experts slots in each group; for expert_choice the factor is the mean
    number of experts of a token"""
    rounding: Literal[1, 4] = 1
    """slots are rounded down, or (axlearn until 2024) up to a multiple of 4 where they are more than one"""
    group_size: int | None = None
    """tokens of a group (S), a divisor of the micro-batch's tokens; empty: each sequence is a group"""
    at_evaluation: bool = False
    """keep the capacity in validation, as the papers do; tasks and decoding are always dropless. Where group_size does
    not divide the tokens at hand, each sequence is a group"""

    def __post_init__(self) -> None:
        require_positive(**{"capacity.factor": float(self.factor)})
        if self.rounding not in (1, 4):
            raise InputError(f"capacity.rounding={self.rounding} must be 1 or 4; leave it out for 1")
        if self.group_size is not None:
            require_positive(**{"capacity.group_size": self.group_size})

    def slots(self, group_size: int, num_experts: int) -> int:
        """Slots of each expert in a group (C); more than it has tokens would stay empty."""
        slots = max(1, int(group_size * self.factor / num_experts))
        return slots if slots == 1 else min(group_size, self.rounding * math.ceil(slots / self.rounding))


@dataclass(frozen=True)
class MoEConfig:
    """Which feed-forward layers are routed, and how."""

    num_experts: int = 8
    """experts in each routed layer (E)"""
    top_k: int = 2
    """experts that each token visits (K)"""
    expert_dim: int | None = None
    """hidden width of one expert (F); empty: the width of the dense feed-forward"""
    every: int = 1
    """every n-th layer is routed: layers n-1, 2n-1, ... counted from 0"""
    layers: tuple[int, ...] | None = None
    """the routed layers by number, counted from 0; takes the place of `every`"""
    renormalize: bool = True
    """divide the gates of a token by their sum; with top_k=1 they are then 1, and the router learns from its losses"""
    balance_loss_weight: float = 0.01
    """weight of the load-balancing loss"""
    z_loss_weight: float = 0.001
    """weight of the router z-loss"""
    num_shared_experts: int = 0
    """experts that every token visits beside the routed ones; they are one feed-forward of their joint width"""
    shared_expert_dim: int | None = None
    """hidden width of one shared expert; empty: that of a routed one"""
    shared_gate: bool = False
    """multiply the shared experts' output by a sigmoid gate of the token (Qwen2-MoE)"""
    router: RouterConfig = RouterConfig()
    """how logits become choices and gates"""
    capacity: CapacityConfig | None = None
    """slots of an expert; empty: no token is dropped"""
    balance_level: Literal["micro_batch", "sequence", "group", "global"] | None = None
    """what the load-balancing loss balances over: a micro-batch, each sequence, each capacity group, or the whole batch
    with all ranks and accumulated micro-batches so far; empty: group for gshard, else micro_batch"""
    aux_reduction: Literal["mean", "sum"] = "mean"
    """how balance and z-loss of the routed layers are put together"""

    def __post_init__(self) -> None:
        require_positive(num_experts=self.num_experts, top_k=self.top_k, every=self.every)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.top_k > self.num_experts:
            raise InputError(
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; "
                f"a token can visit each expert once: choose top_k <= {self.num_experts}"
            )
        for name in ("balance_loss_weight", "z_loss_weight", "num_shared_experts"):
            require_not_negative(**{name: getattr(self, name)})
        check_routing(self)

    @property
    def level(self) -> Literal["micro_batch", "sequence", "group", "global"]:
        """What the load-balancing loss balances over."""
        return self.balance_level or ("group" if self.router.kind == "gshard" else "micro_batch")

    @property
    def gates_add_up_to_one(self) -> bool:
        """True when equal experts give what one of them would, as long as no token is dropped."""
        return self.router.kind == "top_k" and self.renormalize and self.router.gate_scale == 1

    def trained_like(self, other: "MoEConfig") -> "MoEConfig":
        """This layer with the training settings of another that is equal to it but for those."""
        capacity = self.capacity
        if capacity is not None and other.capacity is not None:
            capacity = replace(capacity, at_evaluation=other.capacity.at_evaluation)
        return replace(
            self,
            balance_loss_weight=other.balance_loss_weight,
            z_loss_weight=other.z_loss_weight,
            balance_level=other.balance_level,
            aux_reduction=other.aux_reduction,
            router=replace(self.router, bias_update_rate=other.router.bias_update_rate),
            capacity=capacity,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` reads it back."""
        return asdict(self) | {"layers": None if self.layers is None else list(self.layers)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "MoEConfig":
        """The configuration that `to_dict` wrote."""
        router, capacity = record.get("router"), record.get("capacity")
        parts = {
            "router": RouterConfig(**router or {}),
            "capacity": None if capacity is None else CapacityConfig(**capacity),
        }
        return cls(**{**record, **parts})


def check_groups(moe: MoEConfig | None, tokens: int) -> None:
    """Raise `InputError` when a micro-batch of so many tokens does not fall into groups of the configured size."""
    size = moe.capacity.group_size if moe is not None and moe.capacity is not None else None
    if size is not None and tokens % size:
        raise InputError(
            f"capacity.group_size={size} does not divide the {tokens} tokens of a micro-batch; "
            "choose a divisor of batch_size * seq_len, or leave it out: each sequence is then a group"
        )


def check_routing(moe: MoEConfig) -> None:
    """Raise `InputError` for options of routing that contradict each other, or would do nothing."""
    router, capacity = moe.router, moe.capacity
    rules = [
        (
            router.kind != "top_k" and capacity is None,
            f"router.kind={router.kind} without capacity has no slots; set moe.capacity (factor 2.0 is usual)",
        ),
        (
            router.kind == "gshard"
            and (moe.top_k, router.score, moe.renormalize, router.gate_scale) != (2, "softmax", True, 1),
            f"router.kind=gshard with top_k={moe.top_k}, score={router.score}, renormalize={moe.renormalize}, "
            f"gate_scale={router.gate_scale} is not GShard's top-2; use top_k=2, score=softmax, renormalize=true, "
            "gate_scale=1, or kind=top_k",
        ),
        (
            router.kind == "gshard" and moe.level != "group",
            f"balance_level={moe.balance_level} with router.kind=gshard: GShard balances each group; leave it out",
        ),
        (
            moe.level == "group" and capacity is None,
            "balance_level=group without capacity: there are no groups; set moe.capacity, or balance_level=sequence",
        ),
        (
            router.kind == "expert_choice" and capacity is not None and capacity.factor != moe.top_k,
            f"router.kind=expert_choice with top_k={moe.top_k} and capacity.factor="
            f"{capacity.factor if capacity else None}: the factor is the mean number of experts of a token; set both "
            "alike",
        ),
        (
            router.kind == "expert_choice"
            and (moe.balance_loss_weight > 0 or moe.renormalize or router.score == "softmax_of_top_k"),
            f"router.kind=expert_choice with balance_loss_weight={moe.balance_loss_weight}, "
            f"renormalize={moe.renormalize}, score={router.score}: experts choose, loads are even, tokens have no "
            "top k; set balance_loss_weight=0, renormalize=false and score=softmax or sigmoid",
        ),
        (
            router.kind != "top_k" and (router.bias_update_rate > 0 or router.expert_groups > 1),
            f"router.kind={router.kind} with bias_update_rate={router.bias_update_rate}, expert_groups="
            f"{router.expert_groups}: both steer a token's top-k choice; leave them out, or use kind=top_k",
        ),
        (
            router.score == "softmax_of_top_k" and not moe.renormalize,
            "router.score=softmax_of_top_k with renormalize=false: these gates always add up to 1; "
            "use score=softmax to keep the chosen probabilities as they are",
        ),
        (
            router.kind == "expert_choice" and moe.balance_level is not None,
            f"balance_level={moe.balance_level} with router.kind=expert_choice: there is no balance loss; leave it out",
        ),
        (
            moe.num_experts % router.expert_groups > 0
            or router.top_groups * (moe.num_experts // router.expert_groups) < moe.top_k,
            f"router.expert_groups={router.expert_groups}, top_groups={router.top_groups} do not leave "
            f"top_k={moe.top_k} of num_experts={moe.num_experts} to choose from; "
            f"choose a divisor of {moe.num_experts}, and more top_groups",
        ),
        (
            moe.num_shared_experts == 0 and (moe.shared_gate or moe.shared_expert_dim is not None),
            f"shared_gate={moe.shared_gate}, shared_expert_dim={moe.shared_expert_dim} without shared experts do "
            "nothing; set num_shared_experts, or leave them out",
        ),
    ]
    for broken, message in rules:
        if broken:
            raise InputError(message)
