"""Balance of routed layers over an optimizer step: the routing losses, and the biases that follow the load.

Letters: N routed layers, E experts, G groups of tokens, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from modules.functional.routing import RoutingStats, moved_bias
from modules.layers.experts import RoutedExperts
from modules.moe_config import MoEConfig
from modules.world import World


class RoutingBalance:
    """Counts choices over the accumulated micro-batches of a step, where a loss or a bias asks for it."""

    def __init__(self) -> None:
        self._counts_NE: Tensor | None = None

    def losses(
        self, moe: MoEConfig, stats: Sequence[RoutingStats], world: World, share: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted balance and z-loss of all routed layers of a micro-batch, and what callbacks watch of them.

        Args:
            share: this process's part of the tokens of all. The losses that are watched are means over its tokens;
                the total is its part of the loss of all.
        """
        counts_NE = torch.stack([layer.tokens_per_expert_E for layer in stats])
        balance_share = share
        if moe.balance_loss_weight and moe.level == "global":
            counts_NE = self._add(world.sum_over_data(counts_NE))
            stats = _with_fractions(stats, counts_NE)
        elif moe.router.bias_update_rate:
            self._add(counts_NE)
        if moe.balance_loss_weight and world.data_ranks > 1:
            if moe.level == "micro_batch":
                stats = _with_fractions(stats, world.sum_over_data(counts_NE))
            elif moe.level in ("sequence", "group"):
                balance_share = world.share(len(stats[0].fractions_GE), stats[0].z_loss)
        balance_N = torch.stack([layer.balance_loss for layer in stats])
        z_N = torch.stack([layer.z_loss for layer in stats])
        weighted_N = moe.balance_loss_weight * balance_share * balance_N + moe.z_loss_weight * share * z_N
        total = weighted_N.sum() if moe.aux_reduction == "sum" else weighted_N.mean()
        means = {"balance_loss": balance_N.detach().mean(), "z_loss": z_N.detach().mean()}
        return total, watched_routing(stats) | means

    @torch.no_grad()
    def end_step(self, moe: MoEConfig | None, layers: Sequence[RoutedExperts], world: World) -> None:
        """Move the selection biases towards an even load, and begin to count the next step's choices."""
        counts_NE, self._counts_NE = self._counts_NE, None
        if moe is None or not moe.router.bias_update_rate or counts_NE is None:
            return
        if moe.level != "global" or not moe.balance_loss_weight:  # there it is the sum over ranks already
            counts_NE = world.sum_over_data(counts_NE)
        for layer, counts_E in zip(layers, counts_NE, strict=True):
            bias_E = layer.router.selection_bias_E
            assert bias_E is not None
            bias_E.copy_(moved_bias(bias_E, counts_E, moe.router.bias_update_rate))

    def _add(self, counts_NE: Tensor) -> Tensor:
        """Choices per layer and expert in this step so far."""
        self._counts_NE = counts_NE if self._counts_NE is None else self._counts_NE + counts_NE
        return self._counts_NE


def _with_fractions(stats: Sequence[RoutingStats], counts_NE: Tensor) -> list[RoutingStats]:
    """Routing whose loads are those of all processes, or of all micro-batches so far."""
    shares_NE = counts_NE.double() / counts_NE.sum(dim=1, keepdim=True)
    return [
        replace(layer, fractions_GE=share_E[None].to(layer.fractions_GE.dtype))
        for layer, share_E in zip(stats, shares_NE, strict=True)
    ]


def watched_routing(stats: Sequence[RoutingStats]) -> dict[str, Tensor]:
    """What callbacks watch of N routed layers: figures by layer, detached."""
    return {
        "tokens_per_expert_NE": torch.stack([layer.tokens_per_expert_E for layer in stats]),
        "dropped_NK": torch.stack([layer.dropped_K for layer in stats]),
        "entropy_N": torch.stack([layer.entropy for layer in stats]),
        "logit_rms_N": torch.stack([layer.logit_rms for layer in stats]),
    }
