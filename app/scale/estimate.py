"""What one stage of a run takes of a machine: exact sizes and bytes, estimated times, and what a layout does badly."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import gcd, sqrt

from app.scale.hardware import Hardware
from app.scale.memory import Memory, cast_bytes, rank_memory
from app.scale.shards import Held, Shards, fake_world, shards_of
from app.scale.tally import Kind
from app.scale.traffic import Collective, bytes_by_kind, step_traffic
from app.scale.workload import Workload
from modules.functional.flops import count_parameters, training_flops_per_token

HIDDEN = ("weights", "gradients")
"""Purposes of collectives that run beside the products; the others are waited for."""
EVEN = 1.05
"""Up to so many times an even part, parts count as even."""
NOTABLE = 0.1
"""Share of a device's memory from which a single cause is worth a line."""
MANY_EXPERTS = 8
"""From so many on, bringing all experts of a layer to every rank is worth a line."""


@dataclass(frozen=True)
class ScaleEstimate:
    """A stage in a layout. Sizes and bytes of collectives are exact, times and activations are estimates.

    Attributes:
        first, last: what the first rank holds, which has the largest parts, and the last, which has the smallest.
    """

    work: Workload
    hardware: Hardware
    first: Shards
    last: Shards

    @cached_property
    def memory(self) -> Memory:
        """Bytes of the first rank."""
        return rank_memory(self.work, self.first)

    @cached_property
    def traffic(self) -> list[Collective]:
        """The collectives of one optimizer step, on the first rank."""
        return step_traffic(self.work, self.first)

    @property
    def bytes_by_kind(self) -> Counter[Kind]:
        """Bytes of one optimizer step, on the first rank."""
        return bytes_by_kind(self.traffic)

    @property
    def ratio_to_even(self) -> float:
        """The first rank's parameters over those of a model shared out evenly."""
        return self.first.numel * self.work.layout.dp_shard * self.work.layout.tp / self.first.whole_numel

    @property
    def compute_seconds(self) -> float:
        """Estimate: the FLOPs of a step at the hardware's MFU, those of recomputation too."""
        work, hardware = self.work, self.hardware
        flops = training_flops_per_token(work.config, work.seq_len) * recomputation(work)
        return flops * work.tokens_per_step / work.layout.world_size / (hardware.peak_flops * hardware.mfu)

    @property
    def hidden_seconds(self) -> float:
        """Estimate: of collectives that run beside products."""
        return sum(self._seconds(collective) for collective in self.traffic if collective.purpose in HIDDEN)

    @property
    def waited_seconds(self) -> float:
        """Estimate: of collectives whose result the next product needs."""
        return sum(self._seconds(collective) for collective in self.traffic if collective.purpose not in HIDDEN)

    @property
    def step_seconds(self) -> float:
        """Estimate: products or what runs beside them, whichever takes longer, and what is waited for."""
        return max(self.compute_seconds, self.hidden_seconds) + self.waited_seconds

    @property
    def save_seconds(self) -> float:
        """Estimate: to write a checkpoint, by all ranks at once or by the first."""
        writers = 1 if self.work.is_gathered else self.work.layout.world_size
        return checkpoint_bytes(self.work) / writers / self.hardware.storage_bandwidth

    @property
    def save_interval(self) -> float:
        """Estimate: seconds from one checkpoint to the next that lose least, sqrt(2 · save · time between failures).

        By Young (Communications of the ACM 17, 1974), as if training waited while it saves.
        """
        between_failures = 3600 * self.hardware.device_mtbf / self.work.layout.world_size
        return sqrt(2 * self.save_seconds * between_failures)

    def _seconds(self, collective: Collective) -> float:
        if collective.ranks == 1:
            return 0.0
        is_all_to_all = collective.kind == "all_to_all"
        wire = self.hardware.seconds(collective.wire_bytes, collective.ranks, collective.stride, is_all_to_all)
        return wire + collective.calls * self.hardware.latency

    # -- what is wrong -------------------------------------------------------------------------------------------------

    @property
    def warnings(self) -> list[str]:
        """One line for each thing that a better layout would not have."""
        checks = (self._warn_experts(), self._warn_copies(), self._warn_uneven(), self._warn_memory())
        return [line for lines in (*checks, self._warn_communication()) for line in lines]

    def _warn_experts(self) -> list[str]:
        work, moe = self.work, self.work.config.moe
        best = 1 if moe is None else gcd(work.layout.dp_shard, moe.num_experts)
        if moe is None or work.layout.ep > 1 or moe.num_experts < MANY_EXPERTS or best == 1:
            return []
        layer = sum(h.numel for unit, h in self.first.each() if ".experts." in h.name) * work.parameter_bytes
        return [
            f"replicated experts: with ep=1 every rank gathers all {moe.num_experts} experts of each routed layer, "
            f"{in_units(layer // work.layout.tp)} at a time; set ep={best} or another divisor"
        ]

    def _warn_copies(self) -> list[str]:
        layout = self.work.layout
        large = [h for _, h in self.first.each() if h.copies > layout.dp_replicate and h.numel > self._one_percent]
        return [
            f"unsplit: {held.name} {list(held.whole)} is held by {held.copies} ranks instead of {layout.dp_replicate}; "
            f"choose sizes that tp={layout.tp} divides"
            for held in large
        ]

    def _warn_uneven(self) -> list[str]:
        lines = []
        pairs = list(zip(self.first.each(), self.last.each(), strict=True))
        if self.ratio_to_even > EVEN:
            worst = max((first for (_, first), _ in pairs), key=self._excess)
            lines.append(
                f"uneven shards: the first rank holds {self.ratio_to_even:.3g} times an even part, most of it in "
                f"{worst.name} {list(worst.whole)}; share out over fewer ranks (dp_replicate, tp, ep)"
            )
        empty = [(unit.count * held.numel, held.name) for (unit, held), (_, last) in pairs if not last.local_numel]
        if sum(numel for numel, _ in empty) > self._one_percent:  # routers have few rows, and weigh nothing
            largest = max(empty)[1]
            lines.append(
                f"empty shards: the last rank has nothing of {len(empty)} in {len(pairs)} kinds of tensors, "
                f"{largest} among them"
            )
        return lines

    def _excess(self, held: Held) -> float:
        return held.local_numel - held.numel / (self.work.layout.dp_shard * self.work.layout.tp)

    def _warn_memory(self) -> list[str]:
        work, memory, limit = self.work, self.memory, self.hardware.memory_bytes
        lines = []
        if memory.total > limit:
            lines.append(f"too large: about {in_units(memory.total)} of {in_units(limit)}")
        shared = self.first.numel * work.parameter_bytes
        if memory.gradients - shared > NOTABLE * limit:
            lines.append(
                f"accumulation: gradients of {work.accumulate} micro-batches add up outside of the shards, "
                f"{in_units(memory.gradients - shared)}; use larger micro-batches and accumulate_grad_batches=1"
            )
        if cast_bytes(work) > NOTABLE * limit:
            lines.append(
                f"autocast: casts of weights stay until backward, {in_units(cast_bytes(work))}; "
                "strategy gathers=bfloat16 needs none, activation_checkpointing=full drops them"
            )
        largest = max((h.numel for _, h in self.first.each() if h.is_muon), default=0) * work.parameter_bytes
        if work.is_muon and largest > NOTABLE * limit / 2:
            lines.append(
                f"muon: every rank brings the whole of each matrix together, up to {in_units(largest)} at a time"
            )
        return lines

    def _warn_communication(self) -> list[str]:
        communication = self.hidden_seconds + self.waited_seconds
        if communication <= self.compute_seconds:
            return []
        by_purpose: Counter[str] = Counter()
        for collective in self.traffic:
            by_purpose[collective.purpose] += self._seconds(collective)  # type: ignore[assignment]
        purpose, seconds = by_purpose.most_common(1)[0]
        return [
            f"communication bound: about {communication:.3g} s of a step against {self.compute_seconds:.3g} s of "
            f"products, {seconds:.3g} s for {purpose}"
        ]

    @property
    def _one_percent(self) -> float:
        return self.first.whole_numel / 100


def estimate(work: Workload, hardware: Hardware) -> ScaleEstimate:
    """Build the first and the last rank's part of the model, and look."""
    world_size = work.layout.world_size
    ranks = []
    for rank in (0, world_size - 1):
        with fake_world(rank, world_size):
            ranks.append(shards_of(work.config, work.layout, rank, work.is_muon, work.wrapping))
    return ScaleEstimate(work, hardware, *ranks)


def recomputation(work: Workload) -> float:
    """FLOPs with recomputation over those without: all of the blocks forward again, or their attention."""
    config, kind = work.config, work.wrapping.activation_checkpointing
    if kind == "none":
        return 1.0
    per_token = training_flops_per_token(config, work.seq_len)
    if kind == "full":
        return 1 + (per_token - 6 * config.vocab_size * config.dim) / per_token / 3
    query, key = config.num_heads * config.head_size, config.kv_heads * config.head_size
    attention = 6 * config.num_layers * (config.dim * 2 * (query + key) + query * work.seq_len)
    return 1 + attention / per_token / 3


def checkpoint_bytes(work: Workload) -> int:
    """Of a checkpoint: weights and optimizer state of the whole model."""
    count = count_parameters(work.config)
    moments = 2 * count.total - (count.non_embedding if work.is_muon else 0)
    return (count.total + moments) * work.parameter_bytes


def in_units(num_bytes: float) -> str:
    """Bytes in the unit that suits them."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            return f"{num_bytes / 2**power:.3g} {unit}"
    return f"{num_bytes:.0f} B"
