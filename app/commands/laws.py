"""`growmoe plan budget`, `plan moe`, `plan fit`: what scaling laws say about a budget, printed ones and one's own."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.laws.limits import Limits
from app.laws.serving import Serving
from modules.errors import InputError, require_positive

if TYPE_CHECKING:
    from rich.table import Table

    from app.laws.budget import Row
    from app.laws.growth import Owned
    from app.laws.law import Law, Optimum


def plan_budget(
    *,
    flops: float | None = None,
    device_hours: float | None = None,
    peak_flops: float = 989e12,
    mfu: float = 0.4,
    law: Literal["chinchilla", "hoffmann", "joint", "fine_grained", "clark", "abnar", "sparse"] = "chinchilla",
    experts: int | list[int] | None = None,
    granularity: float | list[float] | None = None,
    sparsity: float | list[float] | None = None,
    parameters: float | None = None,
    limits: Limits = Limits(),
    have_parameters: float | None = None,
    have_tokens: float | None = None,
) -> None:
    """Print the compute-optimal size and tokens of a training budget, by a printed law.

    Args:
        flops: training FLOPs, 6 for each active parameter and token, or the law's own count.
        device_hours: the budget in hours of one accelerator instead, at `peak_flops` and `mfu`.
        peak_flops: of an accelerator; an H100's in bfloat16 when left out.
        mfu: share of the peak that training reaches.
        law: chinchilla (refitted by Besiroglu et al.), hoffmann (as printed), joint (dense and mixtures), fine_grained
            (mixtures of small experts), clark (routed models at 130B tokens), abnar (which share of experts rests), or
            sparse (weights that are zero).
        experts: of each layer, such as [1, 8, 32], for joint and clark.
        granularity: into how many each expert is split, such as 16, for fine_grained.
        sparsity: share that rests (abnar) or is zero (sparse), such as [0.5, 0.9].
        parameters: a size that is fixed, as the law counts it; its tokens follow from the budget.
        limits: memory for joint, and inference tokens that the budget pays, too.
        have_parameters: of a dense model that one has; prints what further FLOPs do with it, and without.
        have_tokens: that it has been trained on.
    """
    from app.laws.budget import budget_notes, budget_rows, chosen_values, settings, sizes_of
    from app.laws.growth import Owned, growth_notes
    from app.laws.printed import LAWS

    chosen = LAWS[law]
    values = chosen_values(law, {"experts": experts, "granularity": granularity, "sparsity": sparsity})
    if (have_parameters is None) != (have_tokens is None):
        raise InputError(
            f"have_parameters={have_parameters} and have_tokens={have_tokens}: one alone is no trained model; give both"
        )
    budget = _budget(flops, device_hours, peak_flops, mfu)
    rows = budget_rows(chosen, budget, values, parameters, limits)
    knob, sizes = chosen.knob, sizes_of(chosen, limits)
    paid = "FLOPs of training and inference" if limits.inference_tokens else "training FLOPs"
    table = _new_table(f"{budget:.3g} {paid}, {chosen.name}", chosen)
    for column in (*([knob.name] if knob else []), "parameters", "tokens", "tokens per parameter", "loss", *sizes):
        table.add_column(column, justify="right")
    for row in rows:
        named = [f"{value:.4g}" for value in settings(chosen, row.value).values()]
        others = [_short(size(row.best.parameters, row.value or 0.0)) for size in sizes.values()]
        table.add_row(*named, *_cells(row.best), *others)
    notes = budget_notes(chosen, rows, limits)
    if have_parameters is None or have_tokens is None:
        _show(table, notes)
        return
    owned = Owned(chosen, have_parameters, have_tokens)
    advice = growth_notes(owned, budget)
    _show(table, notes)
    _show(_growth_table(owned, budget, rows), advice)


def _budget(flops: float | None, device_hours: float | None, peak_flops: float, mfu: float) -> float:
    """Training FLOPs, from exactly one of two."""
    if flops is not None and device_hours is None:
        return flops
    if device_hours is None or flops is not None:
        given = "neither" if flops is None else "both"
        raise InputError(f"flops and device_hours: {given} given; give exactly one of them")
    require_positive(device_hours=device_hours, peak_flops=peak_flops, mfu=mfu)
    return device_hours * 3600 * peak_flops * mfu


def _cells(best: "Optimum") -> list[str]:
    """Of parameters, tokens, tokens for each parameter, and loss."""
    return [
        _short(best.parameters),
        _short(best.tokens),
        f"{best.tokens_per_parameter:.3g}",
        f"{best.loss:.4f}",
    ]


def _growth_table(owned: "Owned", flops: float, rows: "list[Row]") -> "Table":
    """The model at hand, the same one after the budget, and what the budget buys from scratch."""
    from app.laws.law import Optimum

    now = Optimum(owned.parameters, owned.tokens, owned.loss(owned.tokens))
    table = _new_table(f"a model that one has, and {flops:.3g} further FLOPs", owned.law)
    table.add_column("", justify="left")
    for column in ("parameters", "tokens", "tokens per parameter", "loss"):
        table.add_column(column, justify="right")
    table.add_row("as it is", *_cells(now))
    table.add_row("going on", *_cells(owned.continued(flops)))
    for row in rows:
        kind = "" if owned.law.knob is None else f", {owned.law.knob.name} {row.value:.4g}"
        table.add_row(f"from scratch{kind}", *_cells(row.best))
    return table


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
    from app.laws.budget import Row, domain_notes
    from app.laws.law import optimum
    from app.laws.printed import JOINT
    from app.laws.serving import best_at_cost, cheapest_at_loss, total_parameters

    assert JOINT.knob is not None
    counts = [int(count) for count in JOINT.knob.check(list(experts if experts is not None else (1, 4, 8, 16, 32)))]
    JOINT.knob.check([base])
    require_positive(top_k=top_k)
    goal = optimum(JOINT, budget, experts=base)
    cost = serving.cost(goal.parameters, base, min(top_k, base))
    title = f"{budget:.3g} training FLOPs; base: {base} experts, {_short(goal.parameters)} active, loss {goal.loss:.3f}"
    table = _new_table(title, JOINT)
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
    rows = [Row(count, optimum(JOINT, budget, experts=count)) for count in counts]
    _show(table, [note, *domain_notes(JOINT, rows, Limits())])


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
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:,.0f}" if number >= 1e3 else f"{number:.3g}"
