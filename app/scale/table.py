"""The plan's table of many processes: a column for each stage."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from app.scale.estimate import ScaleEstimate, checkpoint_bytes, in_units
from app.scale.tally import KINDS

if TYPE_CHECKING:
    from rich.table import Table


def scale_table(estimates: Sequence[ScaleEstimate]) -> "Table":
    """Sizes, bytes and times of every stage; what is estimated has a `~`."""
    from rich.table import Table

    world_size = estimates[0].work.layout.world_size
    table = Table(
        title=f"each of {world_size:,} ranks, and one optimizer step; ~ is an estimate for the hardware below"
    )
    table.add_column("stage")
    for number in range(1, len(estimates) + 1):
        table.add_column(str(number), justify="right")
    for cells in zip(*(rows_of(each) for each in estimates), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    return table


def rows_of(each: ScaleEstimate) -> list[tuple[str, str]]:
    """Names and values of one stage."""
    work, memory, layout = each.work, each.memory, each.work.layout
    last = each.last.numel * work.parameter_bytes
    by_kind = each.bytes_by_kind
    share = memory.total / each.hardware.memory_bytes
    writers = "the first rank" if work.is_gathered else "all ranks"
    return [
        ("dp_replicate, dp_shard, ep, tp", f"{layout.dp_replicate}, {layout.dp_shard}, {layout.ep}, {layout.tp}"),
        ("tokens of a step", f"{work.tokens_per_step:,}"),
        ("parameters, first and last rank", f"{in_units(memory.parameters)}, {in_units(last)}"),
        ("first rank over an even part", f"{each.ratio_to_even:.3f}"),
        ("gradients", in_units(memory.gradients)),
        ("optimizer state", in_units(memory.optimizer)),
        ("~ gathered weights and gradients", in_units(memory.gathered)),
        (f"~ activations ({work.wrapping.activation_checkpointing} computed again)", in_units(memory.activations)),
        ("~ all of them (of the device)", f"{in_units(memory.total)} ({share:.0%})"),
        *((kind.replace("_", "-"), in_units(by_kind[kind])) for kind in KINDS),
        ("~ products", f"{each.compute_seconds:.3g} s"),
        ("~ communication beside products", f"{each.hidden_seconds:.3g} s"),
        ("~ communication that is waited for", f"{each.waited_seconds:.3g} s"),
        ("~ step", f"{each.step_seconds:.3g} s"),
        (f"checkpoint, written by {writers}", in_units(checkpoint_bytes(work))),
        ("~ time to save it; between saves", f"{each.save_seconds:.3g} s; {each.save_interval / 60:.3g} min"),
        ("~ steps between saves", f"{max(1, round(each.save_interval / each.step_seconds)):,}"),
    ]
