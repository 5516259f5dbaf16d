"""`growmoe plan budget`, `plan moe`, `plan fit`: what scaling laws say about a budget, printed ones and one's own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.laws.serving import Serving
from modules.errors import InputError, require_positive

if TYPE_CHECKING:
    from rich.table import Table

    from app.laws.law import Law, Optimum


def plan_budget(
    *,
    flops: float | None = None,
    device_hours: float | None = None,
    peak_flops: float = 989e12,
    mfu: float = 0.4,
    law: Literal["chinchilla", "hoffmann", "joint"] = "chinchilla",
    experts: list[int] | None = None,
) -> None:
    """Print the compute-optimal size and tokens of a training budget, by a printed law.

    Args:
        flops: training FLOPs, 6 for each active parameter and token.
        device_hours: the budget in hours of one accelerator instead, at `peak_flops` and `mfu`.
        peak_flops: of an accelerator; an H100's in bfloat16 when left out.
        mfu: share of the peak that training reaches.
        law: chinchilla (refitted by Besiroglu et al.), hoffmann (as printed), or joint (dense and mixtures).
        experts: of each layer, such as [1, 8, 32], for joint.
    """
    from app.laws.law import optimum
    from app.laws.printed import LAWS

    if (flops is None) == (device_hours is None):
        given = "neither" if flops is None else "both"
        raise InputError(f"flops and device_hours: {given} given; give exactly one of them")
    if experts is not None and law != "joint":
        raise InputError(f"experts={experts} with law={law}, which knows dense models alone; set law=joint")
    if device_hours is not None:
        require_positive(device_hours=device_hours, peak_flops=peak_flops, mfu=mfu)
        flops = device_hours * 3600 * peak_flops * mfu
    assert flops is not None
    chosen = LAWS[law]
    if law == "joint":
        counts = _checked(experts or [1, 2, 4, 8, 16, 32])
        found = [(count, optimum(chosen, flops, experts=count)) for count in counts]
    else:
        found = [(1, optimum(chosen, flops))]
    table = _new_table(f"{flops:.3g} training FLOPs, {chosen.name}", chosen)
    for column in ("experts", "parameters", "tokens", "tokens per parameter", "loss"):
        table.add_column(column, justify="right")
    for count, best in found:
        ratio = f"{best.tokens_per_parameter:.1f}"
        table.add_row(str(count), _short(best.parameters), _short(best.tokens), ratio, f"{best.loss:.3f}")
    _show(table, _warnings(chosen, found))


def plan_moe(
    *,
    budget: float,
    experts: list[int] | None = None,
    base: int = 4,
    top_k: int = 1,
    serving: Serving = Serving(),
) -> None:
    """Print which mixture serves best for a training budget: smaller than loss-optimal, trained for longer.

    For each number of experts: the least model that is as good as the loss-optimal one of the base, and the best model
    that costs no more to serve (Yun et al. 2024, algorithms 1 and 2), by the Joint MoE law and a roofline of serving.

    Args:
        budget: training FLOPs, such as 1e22.
        experts: of each layer; 1, 4, 8, 16 and 32 when left out.
        base: the number of experts whose loss-optimal model is to be matched.
        top_k: experts of each token, for what serving reads; the law was fitted with 1.
        serving: the machine and its requests.
    """
    from app.laws.law import optimum
    from app.laws.printed import JOINT
    from app.laws.serving import best_at_cost, cheapest_at_loss, total_parameters

    counts = _checked(experts or [1, 4, 8, 16, 32])
    (base,) = _checked([base])
    require_positive(top_k=top_k)
    goal = optimum(JOINT, budget, experts=base)
    cost = serving.cost(goal.parameters, base, min(top_k, base))
    title = f"{budget:.3g} training FLOPs; base: {base} experts, {_short(goal.parameters)} active, loss {goal.loss:.3f}"
    table = _new_table(title, JOINT)
    table.add_column("experts", justify="right")
    for name in (
        "experts",
        "as good as the base",
        "of its optimum",
        "tokens",
        "all parameters",
        "cost",
        "as cheap",
        "loss",
    ):
        table.add_column(name, justify="right")
    for count in counts:
        used = min(top_k, count)
        small = cheapest_at_loss(JOINT, budget, count, goal.loss, serving, used)
        cheap = best_at_cost(JOINT, budget, count, cost, serving, used)
        cells = ["cannot be", "", "", "", ""]
        if small is not None:
            total = total_parameters(small.chosen.parameters, count, used)
            share, relative = f"{small.size_share:.0%}", f"{small.cost / cost:.2f}"
            cells = [_short(small.chosen.parameters), share, _short(small.chosen.tokens), _short(total), relative]
        last = ["cannot be", ""] if cheap is None else [_short(cheap.chosen.parameters), f"{cheap.chosen.loss:.3f}"]
        table.add_row(str(count), *cells, *last)
    note = f"cost: device-seconds of a million output tokens over the base's {cost:,.0f}; a roofline, not a measurement"
    _show(table, [note, *_warnings(JOINT, [(count, optimum(JOINT, budget, experts=count)) for count in counts])])


def plan_fit(
    runs: Path,
    form: Literal["dense", "mixture"] = "dense",
    flops: float | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> None:
    """Fit a scaling law to runs of one's own, print its constants with 90 % intervals, and what it says about a budget.

    Args:
        runs: a CSV file with the columns parameters, tokens and loss (nats per token), and for mixtures experts.
        form: dense, E + A/N^alpha + B/D^beta (Hoffmann et al.), or mixture (Yun et al., equation 4).
        flops: a training budget to plan for, 6 FLOPs for each parameter and token.
        bootstrap: samples of the runs, drawn with replacement, whose fits give the intervals.
        seed: of these draws.
    """
    from app.laws.fitting import fit, read_runs
    from app.laws.law import optimum

    require_positive(bootstrap=bootstrap)
    rows = read_runs(runs, form)
    found = fit(rows, form, bootstrap, seed)
    table = _new_table(f"{runs}: {len(rows)} runs, {form}", found.law)
    for column in ("constant", "value", "from", "to"):
        table.add_column(column, justify="right")
    for name, values in found.constants.items():
        table.add_row(name, *(f"{value:.4g}" for value in values))
    notes = [f"intervals hold 90 % of {bootstrap} bootstrap fits; error of log L: {found.rmse:.2g} (root mean square)"]
    if flops is not None:
        counts = sorted({int(count) for count in rows[:, 2]}) if form == "mixture" else [1]
        for count in counts:
            best = optimum(found.law, flops, **({"experts": count} if form == "mixture" else {}))
            label = f"{count} experts: " if form == "mixture" else ""
            bought = f"{_short(best.parameters)} parameters, {_short(best.tokens)} tokens, loss {best.loss:.3f}"
            notes.append(f"{label}{flops:.3g} FLOPs buy {bought}")
            notes += found.law.domain.warnings(parameters=best.parameters, tokens=best.tokens)
    _show(table, notes)


def _checked(experts: list[int]) -> list[int]:
    wrong = next((count for count in experts if count < 1), None)
    if wrong is not None:
        raise InputError(f"experts={wrong} must be at least 1; 1 is a dense model")
    return experts


def _warnings(law: "Law", found: list[tuple[int, "Optimum"]]) -> list[str]:
    """What lies outside of what the law was fitted on: the extreme of each quantity."""
    values = {
        "parameters": [best.parameters for _, best in found],
        "tokens": [best.tokens for _, best in found],
        "experts": [float(count) for count, _ in found],
    }
    ends = [{name: pick(numbers) for name, numbers in values.items()} for pick in (min, max)]
    return list(dict.fromkeys(text for end in ends for text in law.domain.warnings(**end)))


def _new_table(title: str, law: "Law") -> "Table":
    from rich.table import Table

    return Table(title=title, caption=f"{law.source}; N counts {law.counts}; losses are of its own data")


def _show(table: Any, notes: list[str]) -> None:
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 160
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
