"""Bytes that each rank sends in one optimizer step, by kind of collective: arithmetic on the shapes that it holds.

`tests/distributed/test_plan_traffic.py` counts the same in real runs. Loads of experts are taken as balanced: without a
capacity a rank's all-to-all may carry more or less than here, while the sum over ranks is the same. Not counted are
sums that callbacks log, validation and checkpoints.

Letters: T tokens of a micro-batch, D model, R rows of experts.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

from app.scale.shards import Shards
from app.scale.tally import Kind
from app.scale.workload import Workload
from modules.config import ModelConfig

COUNT_BYTES = 8
"""Of one number of tokens."""
NORM_BYTES = 8
"""The gradient norm is summed in float64."""


@dataclass(frozen=True)
class Collective:
    """Equal calls of one step, on one rank.

    Attributes:
        purpose: "weights", "gradients", "muon", "tensor", "experts" or "sums".
        num_bytes: of all calls together, as `Tally` counts them.
        ranks, stride: how many take part, and how far apart they are.
    """

    kind: Kind
    purpose: str
    num_bytes: int
    calls: int
    ranks: int
    stride: int

    @property
    def wire_bytes(self) -> float:
        """What leaves this rank: all but its own part, by a ring, which an all-reduce goes around twice."""
        return self.num_bytes * (self.ranks - 1) / self.ranks * (2 if self.kind == "all_reduce" else 1)


def step_traffic(work: Workload, shards: Shards) -> list[Collective]:
    """The collectives of one optimizer step."""
    parts = (_fsdp(work, shards), _tensor_parallel(work), _expert_parallel(work), _sums(work), _muon(work, shards))
    return [collective for collective in chain(*parts) if collective.calls]


def bytes_by_kind(traffic: list[Collective]) -> Counter[Kind]:
    """Bytes of a step by kind of collective."""
    total: Counter[Kind] = Counter()
    for collective in traffic:
        total[collective.kind] += collective.num_bytes
    return total


def _fsdp(work: Workload, shards: Shards) -> list[Collective]:
    """Weights come for forward, and again for backward where they were dropped; gradients go once a step."""
    layout, found = work.layout, []
    for unit in shards.units:
        stride = layout.tp * (layout.ep if unit.is_experts else 1)
        part = unit.count * unit.numel * work.parameter_bytes
        is_dropped = unit.place != "root" and work.wrapping.reshard_after_forward
        uses = work.accumulate * (2 if is_dropped else 1)
        if unit.sharers > 1:
            gathered = uses * unit.count * unit.sharers * unit.numel * work.gathered_bytes(unit.is_rounded)
            gather = Collective("all_gather", "weights", gathered, uses * unit.count, unit.sharers, stride)
            scatter = Collective("reduce_scatter", "gradients", unit.sharers * part, unit.count, unit.sharers, stride)
            found += [gather, scatter]
        if layout.dp_replicate > 1:
            apart = layout.dp_shard * layout.tp
            found.append(Collective("all_reduce", "gradients", part, unit.count, layout.dp_replicate, apart))
    return found


def _tensor_parallel(work: Workload) -> list[Collective]:
    """Sums over the ranks that share out channels: of outputs forward, of the gradients of inputs backward."""
    config, tp = work.config, work.layout.tp
    if tp == 1:
        return []
    narrow = work.tokens * config.dim * work.compute_bytes
    wide = work.tokens * config.dim * work.parameter_bytes
    num_routed = len(config.routed_layers)
    num_dense = config.num_layers - num_routed
    forward = 2 * narrow  # attention; feed-forward, or experts behind their combination
    shared = narrow * bool(config.shared_size)
    gates = work.expert_rows * work.wide_bytes
    gains = 2 * config.head_size * work.parameter_bytes * config.qk_norm
    dense, routed = forward + 2 * wide + gains, forward + 2 * shared + wide + narrow + gates + gains
    calls = 4 + 2 * config.qk_norm
    num_bytes = num_dense * dense + num_routed * routed
    num_calls = num_dense * calls + num_routed * (calls + 1 + 2 * bool(config.shared_size))
    if work.wrapping.activation_checkpointing == "full":  # up to the last tensor that backward needs
        again = config.norm_structure != "prenorm"
        both = narrow * (bool(shared) + again)  # shared experts come before the others are put together
        num_bytes += num_dense * narrow * (1 + again) + num_routed * (narrow + both)
        num_calls += num_dense * (1 + again) + num_routed * (1 + both // narrow)
    words_bytes, words_calls = _vocabulary(work) if config.vocab_size % tp == 0 else (0, 0)
    total, calls = work.accumulate * (num_bytes + words_bytes), work.accumulate * (num_calls + words_calls)
    return [Collective("all_reduce", "tensor", total, calls, tp, 1)]


def _vocabulary(work: Workload) -> tuple[int, int]:
    """Bytes and calls of embedding and loss: words are shared out, and rows of logits come in chunks."""
    ends = 2 * work.tokens * work.config.dim * work.parameter_bytes
    scalars = 3 * work.tokens * work.wide_bytes  # the largest logit; the sum of exponentials and the target's
    return ends + scalars, 2 + 2 * -(-work.tokens // work.loss_chunk_rows)


def _expert_parallel(work: Workload) -> list[Collective]:
    """Rows go to their experts and back; in backward their gradients do. Sizes go ahead where they are not known."""
    config, layout, moe = work.config, work.layout, work.config.moe
    if moe is None or layout.ep == 1:
        return []
    num_layers, is_again = len(config.routed_layers), work.wrapping.activation_checkpointing == "full"
    rows = num_layers * work.accumulate * (6 if is_again else 4)
    sizes = 0 if moe.capacity and work.knows_sizes else num_layers * work.accumulate * (2 if is_again else 1)
    num_bytes = rows * work.expert_rows * config.dim * work.compute_bytes + sizes * moe.num_experts * COUNT_BYTES
    return [Collective("all_to_all", "experts", num_bytes, rows + sizes, layout.ep, layout.tp)]


def _sums(work: Workload) -> list[Collective]:
    """Numbers of tokens, loads of experts, and the gradient norm."""
    layout, calls, num_bytes = work.layout, work.accumulate, work.accumulate * work.wide_bytes
    for size, times in _load_sums(work.config, work.accumulate, work.wide_bytes, layout.data_ranks > 1):
        num_bytes, calls = num_bytes + size * times, calls + times
    data = Collective("all_reduce", "sums", num_bytes, calls, layout.data_ranks, layout.tp)
    return [data, Collective("all_reduce", "sums", NORM_BYTES, 1, layout.world_size, 1)]


def _load_sums(config: ModelConfig, accumulate: int, wide: int, is_shared: bool) -> list[tuple[int, int]]:
    """Sizes and numbers of the sums by which routing is balanced over ranks."""
    moe = config.moe
    if moe is None:
        return []
    loads = len(config.routed_layers) * moe.num_experts * COUNT_BYTES
    is_global = bool(moe.balance_loss_weight) and moe.level == "global"
    found = [(loads, accumulate)] if is_global else []
    if moe.balance_loss_weight and is_shared:
        if moe.level == "micro_batch":
            found.append((loads, accumulate))
        elif moe.level in ("sequence", "group"):
            found.append((wide, accumulate))
    if moe.router.bias_update_rate and not is_global:
        found.append((loads, 1))
    return found


def _muon(work: Workload, shards: Shards) -> list[Collective]:
    """Every rank brings each hidden matrix together."""
    if not work.is_muon:
        return []
    num_bytes = calls = 0
    for unit, held in shards.each():
        num_bytes += unit.count * held.gathered.num_bytes["all_gather"]
        calls += unit.count * held.gathered.calls["all_gather"]
    ranks = work.layout.dp_shard * work.layout.tp
    return [Collective("all_gather", "muon", num_bytes * work.parameter_bytes // 4, calls, ranks, 1)]
