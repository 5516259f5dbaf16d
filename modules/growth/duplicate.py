"""Scale-out of a mixture: every expert becomes m experts (expert duplication, arXiv 2604.19835).

The router rows are copied, so a token's best experts are whole sets of equals. With m times as many experts per token
it visits all of a set, the sets' shares stay what they were, and the function does not change. (Nor does it where a
token had one expert, and visits some of its copies.) New experts, which are all but the first of a set, may be varied,
as in upcycling.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.config import ModelConfig
from modules.errors import InputError
from modules.growth.operation import Moments, ParameterSource
from modules.growth.roles import Axis, role_of
from modules.growth.upcycle import UpcycleRules, hidden_axis
from modules.moe_config import MoEConfig
from modules.optim import ParameterFactors


@dataclass(frozen=True)
class Duplicate:
    """Grow the number of experts to a multiple; the rest of the routed layers stays."""

    source: ParameterSource
    moe: MoEConfig
    rules: UpcycleRules

    def __post_init__(self) -> None:
        before = self._before
        same = replace(self.moe, num_experts=before.num_experts, top_k=before.top_k).trained_like(before)
        same = replace(same, every=before.every, layers=before.layers)  # other words for the same layers are welcome
        if same != before or self.config.routed_layers != self.source.config.routed_layers:
            raise InputError(
                "growth target changes more of a mixture than num_experts, top_k and its training settings; leave the "
                "rest of moe as the source has it"
            )
        if self.moe.num_experts % before.num_experts or not before.top_k <= self.moe.top_k:
            raise InputError(
                f"growth target num_experts={self.moe.num_experts}, top_k={self.moe.top_k} must be a multiple of the "
                f"source's {before.num_experts} experts, and at least its top_k={before.top_k}; correct them"
            )

    @property
    def config(self) -> ModelConfig:
        """The architecture with more experts."""
        return replace(self.source.config, moe=self.moe)

    @property
    def times(self) -> int:
        """m: experts that each one becomes."""
        return self.moe.num_experts // self._before.num_experts

    @property
    def is_exact(self) -> bool:
        """Whether the function stays the same, up to rounding, as long as no token is dropped. Groups of experts are
        judged by their two best, which were different experts, and are now copies of one."""
        moe, top_k, router = self.moe, self._before.top_k, self.moe.router
        if self.times == 1:
            return moe.top_k == top_k
        whole_sets = moe.top_k == self.times * top_k or (top_k == 1 and moe.top_k <= self.times)
        same_groups = router.top_groups == router.expert_groups or router.expert_groups == self._before.num_experts
        is_known = whole_sets and same_groups and router.kind == "top_k"
        return is_known and self.rules.keeps(self.config.expert_size)

    def weight(self, name: str) -> Tensor:
        """The parameter; experts, router rows and the bias of selection are repeated."""
        weight = self.source.weight(name)
        if not self._has_experts(name):
            return weight
        repeated = weight.repeat_interleave(self.times, dim=0)
        if role_of(name).part.startswith("feed_forward.experts."):
            repeated = torch.stack(
                [self._varied(name, expert, matrix) for expert, matrix in enumerate(repeated.unbind())]
            )
        return repeated * self._scale(name)

    def moments(self, name: str) -> Moments | None:
        """The optimizer's state: an expert's gradient is shared out among its m copies, each with top_k' / (m top_k) of
        its tokens and top_k / top_k' of its slope."""
        before, scale = self.source.moments(name), self._scale(name)
        if before is None or not self._has_experts(name):
            return before

        def first(moment: Tensor) -> Tensor:
            shares = moment.repeat_interleave(self.times, dim=0) / (self.times * scale)
            if role_of(name).part.startswith("feed_forward.experts."):
                for expert in (e for e in range(self.moe.num_experts) if e % self.times):
                    dropped = self.rules.dropped(name, expert, self.config.expert_size).to(moment.device)
                    shares[expert].index_fill_(hidden_axis(name), dropped, 0.0)
            return shares

        return before.mapped(first, lambda m: m.repeat_interleave(self.times, dim=0) * (self._slope / scale) ** 2)

    def factors(self, name: str) -> ParameterFactors:
        """Those of the source, with the scale of weights and of gradients."""
        if not self._has_experts(name):
            return self.source.factors(name)
        scale = self._scale(name)
        follows = ParameterFactors(lr=scale, weight_decay=1 / scale, eps=self._slope / scale)
        return self.source.factors(name) * follows

    @property
    def _before(self) -> MoEConfig:
        moe = self.source.config.moe
        assert moe is not None, "the source has experts"
        return moe

    @property
    def _slope(self) -> float:
        """The root of what becomes of a mean squared gradient: of the tokens and of the slope, as in `moments`."""
        return math.sqrt(self._before.top_k / (self.times * self.moe.top_k))

    def _has_experts(self, name: str) -> bool:
        return Axis.EXPERT in role_of(name).axes

    def _varied(self, name: str, expert: int, matrix: Tensor) -> Tensor:
        return self.rules.varied(name, expert, matrix) if expert % self.times else matrix

    def _scale(self, name: str) -> float:
        """On up and down, where gates are not divided by their sum: the root of what the chosen gates lose or gain. A
        bias is added to scores, and those of a softmax become 1/m of what they were."""
        if name.endswith(".selection_bias_E") and self.moe.router.score != "sigmoid":
            return 1 / self.times
        if self.moe.renormalize or not name.endswith((".experts.up", ".experts.down")):
            return 1.0
        kept = self.moe.top_k / self._before.top_k  # of sigmoids, each as large as before
        return 1 / math.sqrt(kept if self.moe.router.score == "sigmoid" else kept / self.times)
