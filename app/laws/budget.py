"""The rows of a plan: what a budget buys by one law, for each value of what else the law knows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from app.laws.law import Law, Optimum, at_size, best_setting, optimum
from app.laws.limits import Limits, within
from app.laws.printed import JOINT, LAWS
from modules.errors import InputError, require_positive


@dataclass(frozen=True)
class Row:
    """A model of a plan.

    Attributes:
        value: of the law's knob; None where it has none.
        best: what the budget buys.
    """

    value: float | None
    best: Optimum


def settings(law: Law, value: float | None) -> dict[str, float]:
    """The keyword of a law's knob."""
    return {} if law.knob is None or value is None else {law.knob.name: value}


def chosen_values(name: str, given: Mapping[str, float | Sequence[float] | None]) -> list[float] | None:
    """The values for the knob of the law of a name, from options of which at most that one may be given.

    Raises:
        InputError: an option that the law does not know, or a value that means nothing.
    """
    knob = LAWS[name].knob
    for option, value in given.items():
        if value is not None and (knob is None or knob.name != option):
            fitting = " or ".join(other for other, law in LAWS.items() if law.knob and law.knob.name == option)
            raise InputError(f"{option}={value} with law={name}, which knows no {option}; set law={fitting}")
    value = None if knob is None else given[knob.name]
    if knob is None or value is None:
        return None
    return knob.check([float(each) for each in (value if isinstance(value, Sequence) else [value])])


def budget_rows(
    law: Law, flops: float, values: list[float] | None, parameters: float | None, limits: Limits
) -> list[Row]:
    """What a budget buys, for each value of the law's knob.

    Args:
        law: by which.
        flops: training FLOPs, and those of inference where limits name tokens.
        values: of the knob; the law's own when None, and with them the best one, where it may be any number.
        parameters: a fixed size, as the law counts it; None for the best one.
        limits: of memory, for the Joint law, and inference tokens.

    Raises:
        InputError: limits that the law has no shape for; a size that the law or the limits set already.
    """
    is_limited = limits.memory_bytes is not None
    if law is not JOINT and (is_limited or limits.kv_tokens):
        raise InputError(
            f"limits.memory_bytes={limits.memory_bytes} and limits.kv_tokens={limits.kv_tokens:g} with the "
            f"{law.name}, whose models have no known shape; set law=joint (experts=1 is dense)"
        )
    if parameters is not None:
        require_positive(parameters=float(parameters))
        if law.fixed_tokens is not None or is_limited:
            reason = "limits.memory_bytes sets" if is_limited else f"the {law.name} sets (tokens are fixed)"
            raise InputError(f"parameters={parameters:g} is a size that {reason}; leave parameters out")
    lasting = limits.inference_tokens

    def at(value: float | None) -> Optimum:
        chosen = settings(law, value)
        if parameters is not None:
            return at_size(law, flops, parameters, lasting, **chosen)
        if law is JOINT:
            return within(law, flops, chosen["experts"], limits)
        return optimum(law, flops, inference_tokens=lasting, **chosen)

    if law.knob is None:
        return [Row(None, at(None))]
    rows = [Row(value, at(value)) for value in values or law.knob.values]
    if values is None and law.knob.bounds is not None:
        value, best = best_setting(law, flops, parameters, inference_tokens=lasting)
        if value not in law.knob.values:
            rows.append(Row(value, best))
    return sorted(rows, key=lambda row: row.value or 0.0)


def sizes_of(law: Law, limits: Limits) -> Mapping[str, Callable[[float, float], float]]:
    """What else to print of a model, by name, from N and the value of the law's knob."""
    return limits.sizes if law is JOINT else law.sizes


def budget_notes(law: Law, rows: Sequence[Row], limits: Limits) -> list[str]:
    """Which row is best, what to know of the law, and what lies outside of where it was fitted."""
    notes = []
    if law.knob is not None and len(rows) > 1:
        best = min(rows, key=lambda row: row.best.loss)
        edge = "; the largest here: more may be better still" if best is rows[-1] else ""
        notes.append(f"least loss at {law.knob.name} {best.value:.4g}{edge}")
    return [*notes, *law.remarks, *domain_notes(law, rows, limits)]


def domain_notes(law: Law, rows: Sequence[Row], limits: Limits) -> list[str]:
    """What lies outside of where the law was fitted: the extremes of each quantity."""
    quantities = [
        {"parameters": row.best.parameters, "tokens": row.best.tokens}
        | settings(law, row.value)
        | {name: size(row.best.parameters, row.value or 0.0) for name, size in sizes_of(law, limits).items()}
        for row in rows
    ]
    notes = []
    for name, (low, high) in law.domain.ranges.items():
        values = [each[name] for each in quantities]
        outside = [*([min(values)] if min(values) < low else []), *([max(values)] if max(values) > high else [])]
        notes += [text for value in outside for text in law.domain.warnings(**{name: value})]
    return notes
