"""Headline numbers and tables of the report as HTML. Every value from a run goes through `escape`."""

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from app.report import words
from app.report.data import Record, RunData, Score, Series, scores
from app.report.document import table
from app.report.load import FinalLoad, named

TIME_COLUMNS = {"perf/accelerator_s": "Accelerator time", "perf/wall_s": "Wall time"}
"""metrics that hold the seconds a run has taken so far"""


def headline_cards(data: RunData) -> str:
    """The numbers that a reader looks for first."""
    cards = [*_quality_cards(data), *_size_cards(data), *_cost_cards(data)]
    return "".join(
        f"<div class=card><h3>{escape(title)}</h3><strong>{escape(value)}</strong><span>{escape(note)}</span></div>"
        for title, value, note in cards
    )


def transition_table(data: RunData) -> str:
    """One row per transition."""
    rows = [_transition_row(number, record) for number, record in enumerate(data.transitions, start=1)]
    note = "Loss before and after on the same held batch. Max logit drift: the largest change of any logit on it; "
    note += "exact: a method that keeps the function, up to rounding."
    head = ("#", "step", "tokens", "kind", "method", "model", "loss", "max logit drift", "optimizer state", "took")
    return table(head, rows, note, left=(3, 4, 5, 8))


def evaluation_tables(data: RunData) -> tuple[str, str]:
    """The last evaluation beside chance and the first one: the tasks that were asked for, and the rest."""
    first, last = data.evaluations[0], data.evaluations[-1]
    start = {score.task: score.value for score in scores(first)} if first is not last else {}
    found = {score.task: _score_row(score, start.get(score.task)) for score in scores(last)}
    asked = [row for task, row in found.items() if task in data.accuracies] or list(found.values())
    others = [row for task, row in found.items() if row not in asked] + _other_metrics(last)
    facts = [f"step {last['step']}", f"{words.short(data.x_of(last))} {data.x_name}"]
    facts += [f"suite {words.listed(last['suite'])}"] if last.get("suite") else []
    facts += [f"limit {words.listed(last['limit'])}"] if last.get("limit") else []
    facts += [f"{name} {version}" for name, version in _harness_versions(last)]
    facts += [f"first: step {first['step']}"] if start else []
    head = ("task", "metric", "shots", "documents", "first", "last", "± stderr", "chance", "above chance", "")
    left = (0, 1, 9)
    note = f"{', '.join(facts)}. The mark on a bar is chance."
    return table(head, asked, note, left), table(head, others, left=left) if others else ""


def load_table(final: FinalLoad) -> str:
    """The final load of each routed layer."""
    rows = []
    for n, layer in enumerate(final.layers):
        busiest, dead = int(np.nanargmax(final.ratios_NE[n])), final.dead(layer)
        numbers = (f"{value:.3f}" for value in (final.cv_N[n], final.peak_N[n], final.least_N[n]))
        experts = int(np.isfinite(final.ratios_NE[n]).sum())
        rows.append([escape(layer), str(experts), *numbers, str(busiest), str(len(dead)), named(dead) if dead else "–"])
    head = ("layer", "experts", "load CV", "busiest / even", "least / even", "busiest expert", "dead", "without tokens")
    return table(head, rows, f"{final.span()}. Layers and experts are counted from 0.", left=(0, 7))


def metrics_table(data: RunData) -> str:
    """First, last, lowest and highest value of every metric."""
    rows = []
    for name in sorted(data.columns):
        y = data.series(name).y
        if len(y):
            numbers = (f"{value:.5g}" for value in (y[0], y[-1], y.min(), y.max()))
            rows.append([escape(name), *numbers, str(len(y))])
    return table(("metric", "first", "last", "lowest", "highest", "rows"), rows, left=(0,))


def versions_table(data: RunData) -> str:
    """Library versions of the newest checkpoint."""
    rows = [[escape(name), escape(version)] for name, version in sorted(data.versions.items())]
    return table(("library", "version"), rows, left=(0, 1))


def _quality_cards(data: RunData) -> list[tuple[str, str, str]]:
    cards = []
    for code in data.languages:
        series = data.series(f"val/bpb_{code}")
        if series:
            note = f"validation, from {series.y[0]:.3f}" if len(series.y) > 1 else "validation"
            cards.append((f"Bits per byte, {words.language(code)}", f"{series.y[-1]:.3f}", note))
    final = {task: series.y[-1] for task, series in data.accuracies.items()}
    known = [task for task in final if task in data.chances]
    if known:
        mean, chance = (float(np.mean([of[task] for task in known])) for of in (final, data.chances))
        above = sum(final[task] > data.chances[task] for task in known)
        tasks = f"{above} of {len(known)} task{'' if len(known) == 1 else 's'} above"
        cards.append(("Mean accuracy", words.percent(mean), f"chance {words.percent(chance)}, {tasks}"))
    elif final:
        mean = float(np.mean(list(final.values())))
        cards.append(("Mean accuracy", words.percent(mean), "chance levels not recorded"))
    return cards


def _size_cards(data: RunData) -> list[tuple[str, str, str]]:
    cards = []
    for kind, title in (("total", "Parameters"), ("active", "Active per token")):
        start, end = _sizes(data, kind)
        if end is not None:
            note = f"from {words.short(start)}, ×{end / start:.3g}" if start and start != end else "at the end"
            cards.append((title, words.short(end), note))
    return cards


def _sizes(data: RunData, kind: str) -> tuple[float | None, float | None]:
    """Parameters at the start and at the end of the run, where they are known."""
    series = data.series(f"growth/params_{kind}")
    sizes = [t[f"params_{kind}"] for t in data.transitions if words.is_number(t.get(f"params_{kind}"))]
    if series:
        before_growth = not data.transitions or series.x[0] <= data.x_of(data.transitions[0])
        return (float(series.y[0]) if before_growth else None), float(series.y[-1])
    return None, (float(sizes[-1]) if sizes else None)


def _cost_cards(data: RunData) -> list[tuple[str, str, str]]:
    tokens, step = data.series("data/tokens"), str(data.last_step)
    cards = [("Tokens", words.short(float(tokens.y[-1])), f"in {step} steps")] if tokens else [("Steps", step, "")]
    timed = [(title, data.series(name)) for name, title in TIME_COLUMNS.items() if data.series(name)]
    cards += [(title, words.duration(float(series.y[-1])), "as logged") for title, series in timed]
    if not timed and data.series("perf/step_ms"):
        cards.append(("Time in steps", words.duration(_seconds_in_steps(data)), "sum of measured step times"))
    speed = data.series("perf/tokens_per_s")
    if speed:
        median = float(np.median(_last_stage(data, speed)))
        cards.append(("Speed", f"{words.short(median)}/s", "tokens, median of last stage"))
    return cards


def _last_stage(data: RunData, series: Series) -> np.ndarray:
    begin = data.x_of(data.transitions[-1]) if data.transitions else -1.0
    values = series.y[series.x > begin]
    return values if len(values) else series.y


def _seconds_in_steps(data: RunData) -> float:
    """Each measured step time stands for the steps since the one before."""
    times = data.columns["perf/step_ms"]
    known = np.isfinite(times)
    return float((np.diff(data.steps[known], prepend=-1) * times[known]).sum() / 1000)


def _transition_row(number: int, record: Record) -> list[str]:
    model = words.architecture_change(record.get("source"), record.get("target"))
    total, active = (record.get(f"params_{kind}") for kind in ("total", "active"))
    sizes = f"{words.short(total)} parameters, {words.short(active)} active" if words.is_number(total) else ""
    exact = "<br><span class=soft>exact</span>" if record.get("exact") is True else ""
    losses = [words.decimal(record.get(f"loss_{side}"), 4) for side in ("before", "after")]
    return [
        str(number),
        escape(str(record["step"])),
        escape(words.short(record.get("tokens"))),
        f"<span class=pill>{escape(words.listed(record.get('kind')))}</span>",
        escape(words.listed(record.get("method"))),
        f"<div class=wrap>{escape(model)}<br><span class=soft>{escape(sizes)}</span></div>",
        escape(" → ".join(losses)),
        escape(words.scientific(record.get("max_logit_drift"))) + exact,
        escape(words.listed(record.get("optimizer_state"))),
        escape(words.duration(record.get("seconds"))),
    ]


def _score_row(score: Score, start: float | None) -> list[str]:
    above = "–" if score.chance is None else f"{100 * (score.value - score.chance):+.1f}"
    return [
        escape(score.task),
        escape(score.metric),
        escape(words.listed(score.shots)),
        escape(words.listed(score.documents)),
        words.percent(start),
        f"<b>{words.percent(score.value)}</b>",
        words.percent(score.stderr),
        words.percent(score.chance),
        above,
        _bar(score.value, score.chance),
    ]


def _bar(value: float, chance: float | None) -> str:
    mark = "" if chance is None else f'<u style="left:{100 * min(max(chance, 0.0), 1.0):.1f}%"></u>'
    return f'<span class=bar><i style="width:{100 * min(max(value, 0.0), 1.0):.1f}%"></i>{mark}</span>'


def _other_metrics(evaluation: Record) -> list[list[str]]:
    """Rows of what tasks report beside their accuracy, without standard errors."""
    shown = {(score.task, score.metric) for score in scores(evaluation)}
    rows = []
    for task, result in sorted(evaluation["results"].items()):
        for name, value in result.items():
            if name != "chance" and "stderr" not in name and (task, name) not in shown and words.is_number(value):
                rows.append([escape(task), escape(name), "", "", "", words.scientific(value), "", "", "", ""])
    return rows


def _harness_versions(evaluation: Record) -> list[tuple[str, Any]]:
    versions = evaluation.get("versions")
    if not isinstance(versions, Mapping):
        return []
    return [(name, versions[name]) for name in ("lm_eval", "datasets") if name in versions]
