"""Scale-out: dense feed-forward layers become routed experts.

Each feed-forward is cut into G shards of the experts' width (G = 1: whole), and expert e starts from shard e mod G; so
experts g·G ... g·G + G - 1 together are one copy of the feed-forward, and they share a router row: a top-k that is a
multiple of G always takes whole copies (virtual groups, arXiv 2410.07524). `copy` with G = 1 is sparse upcycling (arXiv
2212.05055), with G = E and any top-k it is LLaMA-MoE's split (arXiv 2406.16554). `drop` draws a share of each expert's
neurons anew (arXiv 2502.19261), `noise` adds to each expert's weights; both break the symmetry and change the function.

What gates take away is made good by α = G / Γ on the experts' output, Γ being what the gates of a token add up to with
a router of zeros: as sqrt(α) on `up` and `down`, which SwiGLU hands on exactly. With renormalised gates Γ is known for
any router, and the model computes what it did before; otherwise only while the router is zero. The router's
language-model gradient is then exactly zero at the first step where all its experts agree.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import Moments, ParameterSource, seeded_generator
from modules.growth.roles import Axis, role_of
from modules.moe_config import MoEConfig
from modules.optim import ParameterFactors

Variation = Literal["copy", "drop", "noise"]

_EXPERT_PARTS = {
    "feed_forward.experts.gate": "feed_forward.gate.weight",
    "feed_forward.experts.up": "feed_forward.up.weight",
    "feed_forward.experts.down": "feed_forward.down.weight",
}
_SHARED_PARTS = {
    "feed_forward.shared.gate.weight": "feed_forward.gate.weight",
    "feed_forward.shared.up.weight": "feed_forward.up.weight",
    "feed_forward.shared.down.weight": "feed_forward.down.weight",
}
_SCALED = ("up", "up.weight", "down", "down.weight")
_ROUTER = "feed_forward.router.weight"
_SHARED_GATE = "feed_forward.shared_gate.weight"
_BIAS = "feed_forward.router.selection_bias_E"


@dataclass(frozen=True)
class UpcycleRules:
    """How experts come from a feed-forward, or from other experts."""

    variation: Variation = "drop"
    """equal copies, or copies with neurons drawn anew, or with noise"""
    drop_ratio: float = 0.5
    """drop: share of an expert's neurons"""
    noise: float = 0.1
    """noise: its standard deviation, relative to the weights' own"""
    router_std: float = 0.02
    """standard deviation of a new router's weights"""
    seed: int = 0

    def varied(self, name: str, expert: int, matrix: Tensor) -> Tensor:
        """One expert's matrix [D, F] or [F, D], made different from its equals."""
        if self.keeps(matrix.shape[hidden_axis(name)]):
            return matrix
        generator = seeded_generator(self.seed, "redrawn", name, str(expert))
        if self.variation == "noise":
            drawn = torch.randn(matrix.shape, generator=generator).to(matrix)
            return matrix + drawn * (self.noise * matrix.std())
        axis = hidden_axis(name)
        dropped = self.dropped(name, expert, matrix.shape[axis]).to(matrix.device)
        old = matrix.index_select(axis, dropped)
        drawn = torch.randn(old.shape, generator=generator).to(matrix) * old.std() + old.mean()
        return matrix.index_copy(axis, dropped, drawn)

    def keeps(self, hidden: int) -> bool:
        """Whether experts of so many neurons stay what they are."""
        if self.variation == "noise":
            return self.noise == 0
        return self.variation == "copy" or not self._num_dropped(hidden)

    def dropped(self, name: str, expert: int, hidden: int) -> Tensor:
        """Hidden neurons that this expert draws anew, like what they replace: one set for gate, up and down."""
        generator = seeded_generator(self.seed, "dropped", str(role_of(name).layer), str(expert))
        return torch.randperm(hidden, generator=generator)[: self._num_dropped(hidden)].sort().values

    def _num_dropped(self, hidden: int) -> int:
        return round(self.drop_ratio * hidden) if self.variation == "drop" else 0


@dataclass(frozen=True)
class Upcycle:
    """Turn the feed-forward layers that `moe` names into experts.

    Shared experts take the first neurons of the feed-forward, and routed ones the others.
    """

    source: ParameterSource
    moe: MoEConfig
    rules: UpcycleRules = UpcycleRules()

    def __post_init__(self) -> None:
        before, moe = self.source.config, self.moe
        if before.moe is not None:
            raise InputError(
                f"growth source already has num_experts={before.moe.num_experts}; only a dense model can be upcycled: "
                "remove moe from this stage's target"
            )
        size, shared, pool = self.config.expert_size, self.config.shared_size, self._pool
        if pool < size or pool % size:
            raise InputError(
                f"moe.expert_dim={size} does not divide the {pool} hidden neurons that the feed-forward's "
                f"{before.ffn_size} leave beside shared_size={shared}; choose a divisor, or leave expert_dim empty"
            )
        if moe.num_experts % self.num_shards:
            raise InputError(
                f"num_experts={moe.num_experts} is no multiple of the {self.num_shards} shards of width {size} that a "
                "feed-forward is cut into; choose a multiple, or a larger expert_dim"
            )

    @cached_property
    def config(self) -> ModelConfig:
        """The routed architecture."""
        moe, ffn_size = self.moe, self.source.config.ffn_size
        shared = moe.num_shared_experts * (moe.shared_expert_dim or moe.expert_dim or 0)
        if moe.expert_dim is None and shared:
            moe = replace(moe, expert_dim=ffn_size - shared)
        return replace(self.source.config, moe=moe)

    @property
    def num_shards(self) -> int:
        """G: experts that together hold one copy of the feed-forward."""
        return max(1, self._pool // self.config.expert_size)

    @property
    def output_scale(self) -> float:
        """α: what the experts' outputs are multiplied with."""
        moe = self.moe
        gates = 1.0 if moe.renormalize else moe.top_k / moe.num_experts
        if not moe.renormalize and moe.router.score == "sigmoid":
            gates = moe.top_k / 2
        return self.num_shards / (gates * moe.router.gate_scale)

    @property
    def is_exact(self) -> bool:
        """Whether the routed model computes the same function, up to rounding, as long as no token is dropped."""
        moe = self.moe
        takes_all = moe.top_k == moe.num_experts
        adds_up = moe.renormalize or (takes_all and moe.router.score == "softmax")
        gates_known = moe.router.kind == "top_k" and (adds_up or self.rules.router_std == 0)
        return gates_known and self._takes_whole_copies and self.rules.keeps(self.config.expert_size)

    @property
    def _takes_whole_copies(self) -> bool:
        """Whether the shards that a token takes are copies of the whole feed-forward. Of equal scores any may win, so
        that a router of zeros parts shards; and so do groups of experts that do not hold whole copies."""
        moe, router, shards = self.moe, self.moe.router, self.num_shards
        if shards == 1 or moe.top_k == moe.num_experts:
            return True
        parts = router.top_groups < router.expert_groups and (moe.num_experts // router.expert_groups) % shards
        return moe.top_k % shards == 0 and self.rules.router_std > 0 and not parts

    def weight(self, name: str) -> Tensor:
        """The parameter; experts come from the dense feed-forward of their layer, the router is drawn."""
        role = role_of(name)
        if role.part == _ROUTER:
            return self._router(name)
        if role.part in (_BIAS, _SHARED_GATE):
            one = self.source.weight("final_norm.weight")
            shape = (self.moe.num_experts,) if role.part == _BIAS else (1, self.config.dim)
            return torch.zeros(shape, device=one.device, dtype=torch.float32 if role.part == _BIAS else one.dtype)
        if role.part in _SHARED_PARTS:
            return self._shared(name, self.source.weight(self._dense_name(name))) * self._scale(name)
        if role.part not in _EXPERT_PARTS:
            return self.source.weight(name)
        shards = self._shards(name, self.source.weight(self._dense_name(name)))
        experts = [self.rules.varied(name, expert, shard) for expert, shard in enumerate(self._dealt(shards))]
        return torch.stack(experts) * self._scale(name)

    def moments(self, name: str) -> Moments | None:
        """The optimizer's state. A shard's gradient is shared out among its E / G experts (first moment); the second
        moment is that of `_slope`. A redrawn neuron forgets its first moment."""
        role = role_of(name)
        if role.part in (_ROUTER, _SHARED_GATE):
            return None
        if role.part not in _EXPERT_PARTS | _SHARED_PARTS:
            return self.source.moments(name)
        before, scale = self.source.moments(self._dense_name(name)), self._scale(name)
        if before is None:
            return None
        if role.part in _SHARED_PARTS:
            return before.mapped(lambda m: self._shared(name, m) / scale, lambda m: self._shared(name, m) / scale**2)

        def first(moment: Tensor) -> Tensor:
            shares = self._stacked(name, moment * (self.num_shards / self.moe.num_experts / scale))
            for expert in range(self.moe.num_experts):
                dropped = self.rules.dropped(name, expert, self.config.expert_size).to(moment.device)
                shares[expert].index_fill_(hidden_axis(name), dropped, 0.0)
            return shares

        return before.mapped(first, lambda moment: self._stacked(name, moment * (self._slope / scale) ** 2))

    def factors(self, name: str) -> ParameterFactors:
        """Experts keep their feed-forward's factors, with the scale of their weights and of their gradients; the router
        has none."""
        role = role_of(name)
        if role.part in (_ROUTER, _SHARED_GATE):
            return ParameterFactors()
        if role.part not in _EXPERT_PARTS | _SHARED_PARTS:
            return self.source.factors(name)
        scale, slope = self._scale(name), 1.0 if role.part in _SHARED_PARTS else self._slope
        follows = ParameterFactors(lr=scale, weight_decay=1 / scale, eps=slope / scale)
        return self.source.factors(self._dense_name(name)) * follows

    @property
    def _slope(self) -> float:
        """The root of what becomes of a mean squared gradient where the noise outweighs the mean: K/E of the tokens,
        each with G / K of the dense slope."""
        return self.num_shards / math.sqrt(self.moe.num_experts * self.moe.top_k)

    @property
    def _pool(self) -> int:
        """Hidden neurons that routed experts hold."""
        return self.source.config.ffn_size - self.config.shared_size

    def _scale(self, name: str) -> float:
        """The factor on a matrix: sqrt(α) on up and down. A shared expert's gate is 1/2 at first."""
        part = role_of(name).part
        if not part.endswith(_SCALED):
            return 1.0
        if part in _SHARED_PARTS:
            return math.sqrt(2.0) if self.moe.shared_gate else 1.0
        return math.sqrt(self.output_scale)

    def _dense_name(self, name: str) -> str:
        """The dense weight that an expert's matrix starts from (its transpose, for a routed one)."""
        role = role_of(name)
        return f"blocks.{role.layer}.{(_EXPERT_PARTS | _SHARED_PARTS)[role.part]}"

    def _shared(self, name: str, dense: Tensor) -> Tensor:
        """The first neurons; a dense `down` has them as columns."""
        axis = 1 if role_of(name).part.endswith("down.weight") else 0
        return dense.narrow(axis, 0, self.config.shared_size)

    def _shards(self, name: str, dense: Tensor) -> list[Tensor]:
        """The neurons behind those of shared experts, as G matrices in the experts' layout."""
        axis = hidden_axis(name)
        return list(dense.T.narrow(axis, self.config.shared_size, self._pool).split(self.config.expert_size, axis))

    def _stacked(self, name: str, dense: Tensor) -> Tensor:
        """Every expert's shard of a dense tensor, in one."""
        return torch.stack(self._dealt(self._shards(name, dense)))

    def _dealt(self, shards: list[Tensor]) -> list[Tensor]:
        """Expert e's shard, e mod G."""
        return [shards[expert % self.num_shards] for expert in range(self.moe.num_experts)]

    def _router(self, name: str) -> Tensor:
        """One drawn row for each copy of the feed-forward, repeated for its shards."""
        shape = (self.moe.num_experts // self.num_shards, self.config.dim)
        drawn = torch.randn(shape, generator=seeded_generator(self.rules.seed, "router", name))
        rows = drawn.repeat_interleave(self.num_shards, dim=0) * self.rules.router_std
        return rows.to(self.source.weight("final_norm.weight"))


def hidden_axis(name: str) -> int:
    """The axis of hidden neurons in one expert's matrix."""
    axes = role_of(name).axes[1:]
    return next(i for i, axis in enumerate(axes) if axis in (Axis.EXPERT_HIDDEN_OUT, Axis.EXPERT_HIDDEN_IN))
