"""Output and loss over a vocabulary that is shared out over processes, and the two sums of tensor parallelism.

Letters: T tokens, D model, V vocabulary, W words of this process.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from modules.functional.losses import IGNORE_INDEX, linear_cross_entropy


def sum_gradients(tensor: Tensor, tp: DeviceMesh) -> Tensor:
    """The tensor, the same on all processes, each of which computes with it on its own: their gradients are added."""
    return DTensor.from_local(tensor, tp, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_parts(tensor: Tensor, tp: DeviceMesh) -> Tensor:
    """The sum over processes, which goes on as one tensor: each part has the sum's gradient."""
    return (
        DTensor.from_local(tensor, tp, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
    )


class VocabularyParallelOutput:
    """Logits of which each process forms some, and a loss that never has all of them (Megatron, arXiv 1909.08053)."""

    def __init__(self, tp: DeviceMesh) -> None:
        self.tp = tp

    def logits(self, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        """Scores over all words, on every process."""
        mine = torch.nn.functional.linear(sum_gradients(hidden, self.tp), _local(weight_VD))
        return DTensor.from_local(mine, self.tp, [Shard(mine.ndim - 1)], run_check=False).full_tensor()

    def cross_entropy(
        self, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        """As `linear_cross_entropy`: the sum of the losses, and each of them."""
        hidden_TD = sum_gradients(hidden_TD, self.tp)
        return linear_cross_entropy(hidden_TD, _local(weight_VD), targets_T, chunk_rows, self._losses_and_gradient)

    def _losses_and_gradient(self, logits_TW: Tensor, targets_T: Tensor, wide: torch.dtype) -> Tensor:
        """The rows' losses; the logits of this process's words are overwritten by their gradient."""
        group, num_words = self.tp.get_group(), logits_TW.shape[1]
        wide_logits = logits_TW.to(wide)
        top_T1 = wide_logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(top_T1, dist.ReduceOp.MAX, group)
        shifted = wide_logits - top_T1
        place_T1 = targets_T[:, None] - self.tp.get_local_rank() * num_words
        is_mine_T1 = (place_T1 >= 0) & (place_T1 < num_words)
        place_T1 = place_T1.clamp(0, num_words - 1)
        weights = shifted.exp()
        sums_2T1 = torch.stack((weights.sum(dim=-1, keepdim=True), shifted.gather(1, place_T1) * is_mine_T1))
        dist.all_reduce(sums_2T1, group=group)
        total_T1, target_T1 = sums_2T1
        gradient = weights.div_(total_T1)
        logits_TW.copy_(gradient.scatter_add_(1, place_T1, -is_mine_T1.to(wide)))
        return (total_T1.log() - target_T1)[:, 0].masked_fill_(targets_T == IGNORE_INDEX, 0.0)


def _local(weight_VD: Tensor) -> Tensor:
    return weight_VD.to_local() if isinstance(weight_VD, DTensor) else weight_VD
