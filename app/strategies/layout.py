"""How many processes do what: degrees of data, expert and tensor parallelism, and what they must divide.

Pure arithmetic, so that everything is checked before a process group or a weight exists.
"""

from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

from modules.config import ModelConfig
from modules.errors import InputError, require_positive

Degree = int | Literal["auto"]


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism. Ranks are numbered with `tp` running fastest, then `ep`, `efsdp`, `dp_replicate`.

    Attributes:
        dp_replicate: copies of the whole model.
        dp_shard: processes that share out each copy's parameters, and see different samples.
        ep: of these, how many share out the experts of a routed layer; a divisor of `dp_shard`.
        tp: processes that share out heads, feed-forward channels and vocabulary, and see the same samples.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def data_ranks(self) -> int:
        """Processes with different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def efsdp(self) -> int:
        """Processes that share out the same experts among them."""
        return self.dp_shard // self.ep

    def __str__(self) -> str:
        return f"dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard} x tp {self.tp}, ep {self.ep}"

    def check(self, config: ModelConfig) -> None:
        """Raise `InputError` when the layout does not fit a model: torch would make uneven or empty parts silently."""
        moe, tp = config.moe, self.tp
        if moe is not None and moe.num_experts % self.ep:
            raise InputError(
                f"strategy ep={self.ep} does not divide num_experts={moe.num_experts}; "
                f"choose ep from {_listed(_divisors(gcd(moe.num_experts, self.dp_shard)))}"
            )
        widths = {
            "num_heads": config.num_heads,
            "num_kv_heads": config.kv_heads,
            "ffn_dim": config.ffn_size,
            "expert_dim": config.expert_size if moe is not None else 0,
            "shared_expert_dim": config.shared_size,
        }
        for name, width in widths.items():
            if width % tp:
                raise InputError(
                    f"strategy tp={tp} does not divide {name}={width}; "
                    f"choose tp from {_listed(_divisors(gcd(*widths.values())))}"
                )
        if moe is not None and config.expert_size // tp % 8:
            raise InputError(
                f"strategy tp={tp} cuts expert_dim={config.expert_size} into {config.expert_size // tp}, which is no "
                "multiple of 8 as grouped matrix products need; choose a smaller tp, or a larger expert_dim"
            )
        if tp > 1 and config.qk_norm and config.qk_norm_scope != "head":
            raise InputError(
                f"strategy tp={tp} parts the heads over which qk_norm_scope={config.qk_norm_scope} normalises; "
                "choose tp=1, or qk_norm_scope=head"
            )


def resolve_layout(
    world_size: int,
    dp_replicate: Degree = 1,
    dp_shard: Degree = "auto",
    ep: Degree = 1,
    tp: Degree = 1,
    config: ModelConfig | None = None,
) -> Layout:
    """The layout of so many processes; at most one of the first, second and fourth degree is `auto`.

    Args:
        ep: `auto` is the largest degree that divides both `dp_shard` and the experts of `config`.

    Raises:
        InputError: the degrees are not a factorisation of the world; with the choices that are.
    """
    given = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp}
    require_positive(**{f"strategy {k}": v for k, v in {**given, "ep": ep}.items() if v != "auto"})
    open_names = [name for name, degree in given.items() if degree == "auto"]
    if len(open_names) > 1:
        raise InputError(f"strategy {' and '.join(open_names)} are both auto; give one of them")
    known = 1
    for degree in given.values():
        known *= degree if degree != "auto" else 1
    rest, remainder = divmod(world_size, known)
    if remainder or (not open_names and rest != 1):
        raise InputError(
            f"strategy {' x '.join(f'{name} {degree}' for name, degree in given.items())} is no factorisation of "
            f"{world_size} processes; {_factorisations(world_size)}"
        )
    degrees = {name: rest if degree == "auto" else int(degree) for name, degree in given.items()}
    layout = Layout(**degrees)
    if ep == "auto":
        experts = config.moe.num_experts if config is not None and config.moe is not None else 1
        return replace(layout, ep=gcd(layout.dp_shard, experts))
    if layout.dp_shard % ep:
        raise InputError(
            f"strategy ep={ep} does not divide dp_shard={layout.dp_shard}; experts are shared out among the processes "
            f"that share out a copy of the model: choose ep from {_listed(_divisors(layout.dp_shard))}"
        )
    return replace(layout, ep=int(ep))


def _factorisations(world_size: int) -> str:
    """A few ways to use all processes."""
    choices = [f"dp_shard={world_size // tp}, tp={tp}" for tp in _divisors(world_size) if tp <= 8]
    return "for example " + "; ".join(choices)


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
