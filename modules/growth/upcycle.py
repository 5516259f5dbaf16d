"""Scale-out: dense feed-forward layers become routed experts.

`copy` (sparse upcycling, arXiv 2212.05055): E equal copies. With renormalised gates the model computes what it did
before; the router's language-model gradient is then exactly zero at the first step, because all experts agree.
`drop` (drop-upcycling, arXiv 2502.19261): in each expert a share of the hidden neurons is drawn anew, which breaks the
symmetry and changes the function.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import Moments, ParameterSource, seeded_generator
from modules.growth.roles import Axis, role_of
from modules.moe_config import MoEConfig
from modules.optim import ParameterFactors

_EXPERT_PARTS = {
    "feed_forward.experts.gate": "feed_forward.gate.weight",
    "feed_forward.experts.up": "feed_forward.up.weight",
    "feed_forward.experts.down": "feed_forward.down.weight",
}
_ROUTER = "feed_forward.router.weight"
_BIAS = "feed_forward.router.selection_bias_E"


@dataclass(frozen=True)
class Upcycle:
    """Turn the feed-forward layers that `moe` names into experts.

    Args:
        drop_ratio: share of each expert's hidden neurons that are drawn anew (0: plain copies).
        router_std: standard deviation of the fresh router's weights.
    """

    source: ParameterSource
    moe: MoEConfig
    drop_ratio: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        before = self.source.config
        if before.moe is not None:
            raise InputError(
                f"growth source already has num_experts={before.moe.num_experts}; only a dense model can be upcycled: "
                "remove moe from this stage's target"
            )
        if self.moe.num_shared_experts:
            raise InputError(
                f"growth target has num_shared_experts={self.moe.num_shared_experts}, and a feed-forward becomes "
                "routed experts only; leave num_shared_experts out, or train the mixture from scratch"
            )
        if self.config.expert_size != before.ffn_size:
            raise InputError(
                f"moe.expert_dim={self.config.expert_size} differs from the dense feed-forward's {before.ffn_size}; "
                "experts that start from a feed-forward have its width: leave expert_dim empty"
            )
        if not 0 <= self.drop_ratio <= 1:
            raise InputError(f"drop_ratio={self.drop_ratio} must lie between 0 and 1; 0.5 is usual")

    @property
    def config(self) -> ModelConfig:
        """The routed architecture."""
        return replace(self.source.config, moe=self.moe)

    def weight(self, name: str) -> Tensor:
        """The parameter; experts come from the dense feed-forward of their layer, the router is drawn."""
        role = role_of(name)
        if role.part == _ROUTER:
            shape = (self.moe.num_experts, self.config.dim)
            drawn = torch.randn(shape, generator=seeded_generator(self.seed, "router", name))
            return (drawn * self.router_std).to(self.source.weight("final_norm.weight"))
        if role.part == _BIAS:
            return torch.zeros(self.moe.num_experts, device=self.source.weight("final_norm.weight").device)
        if role.part not in _EXPERT_PARTS:
            return self.source.weight(name)
        dense = self.source.weight(self._dense_name(name)).T
        if not self.drop_ratio:
            return dense.expand(self.moe.num_experts, *dense.shape).clone()
        return torch.stack([self._redraw(name, expert, dense) for expert in range(self.moe.num_experts)])

    def moments(self, name: str) -> Moments | None:
        """Adam's state: an expert sees 1/E of the gradient (first moment) in K/E of the tokens, each with a gate of
        about 1/K (second moment, where the noise outweighs the mean); a redrawn neuron forgets its first moment."""
        role = role_of(name)
        if role.part == _ROUTER:
            return None
        if role.part not in _EXPERT_PARTS:
            return self.source.moments(name)
        before = self.source.moments(self._dense_name(name))
        if before is None:
            return None
        num_experts, top_k = self.moe.num_experts, self.moe.top_k
        first = (before.first.T / num_experts).repeat(num_experts, 1, 1)
        second = (before.second.T / (num_experts * top_k)).repeat(num_experts, 1, 1)
        for expert in range(num_experts if self.drop_ratio else 0):
            first[expert].index_fill_(self._hidden_axis(name), self._dropped(name, expert).to(first.device), 0.0)
        return Moments(first, second, before.step)

    def factors(self, name: str) -> ParameterFactors:
        """Experts keep their feed-forward's factors; the router has none."""
        role = role_of(name)
        if role.part == _ROUTER:
            return ParameterFactors()
        if role.part in _EXPERT_PARTS:
            return self.source.factors(self._dense_name(name))
        return self.source.factors(name)

    def _dense_name(self, name: str) -> str:
        """The dense weight that an expert's matrix starts from (its transpose)."""
        role = role_of(name)
        return f"blocks.{role.layer}.{_EXPERT_PARTS[role.part]}"

    def _hidden_axis(self, name: str) -> int:
        """The axis of hidden neurons in one expert's matrix."""
        axes = role_of(name).axes[1:]
        return next(i for i, axis in enumerate(axes) if axis in (Axis.EXPERT_HIDDEN_OUT, Axis.EXPERT_HIDDEN_IN))

    def _dropped(self, name: str, expert: int) -> Tensor:
        """Hidden neurons that this expert draws anew: one set for gate, up and down."""
        hidden = self.config.expert_size
        generator = seeded_generator(self.seed, "dropped", str(role_of(name).layer), str(expert))
        return torch.randperm(hidden, generator=generator)[: round(self.drop_ratio * hidden)].sort().values

    def _redraw(self, name: str, expert: int, dense: Tensor) -> Tensor:
        """One expert's matrix, the dropped neurons drawn from N(mean, std) of the weights that they replace."""
        axis, dropped = self._hidden_axis(name), self._dropped(name, expert).to(dense.device)
        old = dense.index_select(axis, dropped)
        generator = seeded_generator(self.seed, "redrawn", name, str(expert))
        drawn = torch.randn(old.shape, generator=generator).to(dense) * old.std() + old.mean()
        return dense.index_copy(axis, dropped, drawn)
