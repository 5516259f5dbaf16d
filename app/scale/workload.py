"""One optimizer step of one model in one layout: what sizes and costs follow from."""

from dataclasses import dataclass

from app.strategies.layout import Layout
from app.strategies.parallelize import Wrapping
from modules.config import ModelConfig
from modules.errors import InputError
from modules.functional.flops import expert_rows_per_token

_NUMBER_BYTES = {
    "64-true": (8, 8),
    "32-true": (4, 4),
    "bf16-true": (2, 2),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
}


def number_bytes(precision: str) -> tuple[int, int]:
    """Bytes of a number of weights and of one in products, by Lightning's name of the precision."""
    if precision not in _NUMBER_BYTES:
        known = ", ".join(_NUMBER_BYTES)
        raise InputError(f"trainer.precision={precision} cannot be planned for many processes; choose from {known}")
    return _NUMBER_BYTES[precision]


@dataclass(frozen=True)
class Workload:
    """What every rank does between two updates.

    Attributes:
        batch_size: sequences of a micro-batch, on each rank with samples of its own.
        accumulate: micro-batches of a step.
        parameter_bytes: of one number of weights, gradients and optimizer state.
        compute_bytes: of one number in products: 2 under autocast.
        knows_sizes: rows of experts with a capacity are exchanged without telling their number first, as on GPUs.
        is_gathered: the first rank writes checkpoints, of all ranks.
    """

    config: ModelConfig
    layout: Layout
    batch_size: int
    seq_len: int
    wrapping: Wrapping = Wrapping()
    accumulate: int = 1
    loss_chunk_rows: int = 1024
    parameter_bytes: int = 4
    compute_bytes: int = 2
    is_muon: bool = False
    knows_sizes: bool = True
    is_gathered: bool = False

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one rank (T)."""
        return self.batch_size * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Of a step on all ranks."""
        return self.tokens * self.accumulate * self.layout.data_ranks

    @property
    def expert_rows(self) -> int:
        """Rows that a rank's tokens become in a routed layer (R)."""
        return round(self.tokens * expert_rows_per_token(self.config, self.seq_len))

    def gathered_bytes(self, is_rounded: bool) -> int:
        """Of one number of weights when they are gathered."""
        return self.compute_bytes if is_rounded else self.parameter_bytes

    @property
    def wide_bytes(self) -> int:
        """Of one number where float32 is the least."""
        return max(4, self.compute_bytes)
