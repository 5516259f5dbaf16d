"""The report as one HTML document that needs nothing but itself: no scripts, no links, pictures inline."""

from html import escape
from typing import TYPE_CHECKING

from app.report import heatmaps, plots, tables, words
from app.report.data import RunData
from app.report.drawing import drawing_style, to_svg
from app.report.load import read_languages, read_load
from app.report.theme import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATOR = "growmoe report"
"""in the head of the page, so that a later report knows its own file"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""what a browser may load for the page: nothing"""

SYNTHETIC = "data: trained and measured on an invented bilingual world that the project makes itself; not real text."
MAX_MAPS = 8
"""routed layers that have a heat map over the run"""


def render_page(data: RunData) -> str:
    """The whole document."""
    title = escape(data.run_dir.resolve().name)
    badge = f"<p class=badge role=note><b>SYNTHETIC</b> {escape(SYNTHETIC)}</p>" if data.is_synthetic else ""
    with drawing_style():
        sections = "".join(section for section in _sections(data) if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="{GENERATOR}">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
        f"<body><main>\n<header><h1>{title}</h1><p class=soft>{escape(_subtitle(data))}</p>{badge}</header>\n"
        f"<div class=cards>{tables.headline_cards(data)}</div>\n{sections}"
        "<footer>Made by <code>growmoe report</code> from the logs in this run directory.</footer>\n"
        "</main></body>\n</html>\n"
    )


def _sections(data: RunData) -> list[str]:
    """Each section, or an empty string where the run has nothing for it."""
    return [
        _section("Transitions", tables.transition_table(data) if data.transitions else ""),
        _section("Learning", _plots(_learning(data))),
        _section("Evaluation", _evaluation(data) if data.evaluations else ""),
        _section("Expert load", _experts(data)),
        _section("Speed and optimizer", _plots(_machinery(data))),
        _section("Details", _details(data)),
    ]


def _learning(data: RunData) -> list[str]:
    figures = [
        _figure(
            plots.training_loss(data), "loss", "Training loss", "faint: as logged; strong: smoothed within each stage"
        ),
        _figure(plots.validation(data), "bpb", "Validation", "bits per byte, lower is better"),
    ]
    for number, figure in enumerate(plots.accuracy(data), start=1):
        figures.append(_figure(figure, f"accuracy{number}", "Evaluation accuracy", "dashed: chance"))
    figures.append(_figure(plots.parameters(data), "parameters", "Parameters", "all, and those that one token uses"))
    return figures


def _evaluation(data: RunData) -> str:
    asked, others = tables.evaluation_tables(data)
    return asked + (_folded("Parts of these tasks, and other metrics", others) if others else "")


def _machinery(data: RunData) -> list[str]:
    return [
        _figure(plots.speed(data), "speed", "Speed", "tokens per second; time of a step in milliseconds"),
        _figure(plots.optimizer(data), "optimizer", "Optimizer", "learning rate; gradient norm before clipping"),
    ]


def _experts(data: RunData) -> str:
    figures = [
        _figure(plots.load_variation(data), "variation", "Spread of load", "coefficient of variation; 0 is even"),
        _figure(plots.load_peak(data), "peak", "Busiest expert", "its load / an even share; 1 is even"),
        _figure(plots.router(data), "router", "Routers", "entropy of a token's probabilities; size of the logits"),
        _figure(plots.dropped(data), "dropped", "Dropped choices", "share of the choices that found no slot"),
    ]
    log = read_load(data)
    final = log.final()
    if final is None:
        return _plots(figures)
    note = f"{final.summary()} Colour: load / even share; black cross: no token"
    figures.append(_figure(heatmaps.final_map(final), "load", "Load of every expert at the end", note))
    for language, load in read_languages(data).items():
        about = f"{load.summary()} Validation text in {words.language(language)}."
        picture = heatmaps.final_map(load)
        figures.append(_figure(picture, f"load-{language}", f"Experts on {words.language(language)} text", about))
    shown = log.layers if len(log.layers) <= MAX_MAPS else final.telling_layers(MAX_MAPS)
    for number, layer in enumerate(shown):
        about = "; ".join(filter(None, ["load / even share over the run", final.layer_summary(layer)]))
        picture = heatmaps.map_over_time(data, log.over_time(layer), final.dead(layer))
        figures.append(_figure(picture, f"load{number}", f"Experts of layer {layer}", about))
    few = f"Over the run: {len(shown)} of {len(log.layers)} layers, the most uneven ones and some evenly spaced."
    about_few = f"<p class=soft>{few}</p>" if len(shown) < len(log.layers) else ""
    return _plots(figures) + about_few + _folded("Load by layer at the end, in numbers", tables.load_table(final))


def _details(data: RunData) -> str:
    parts = [_folded("Every metric: first, last, lowest, highest", tables.metrics_table(data))] if data.columns else []
    if data.config_text is not None:
        parts.append(_folded("Configuration (config.yaml, resolved)", f"<pre>{escape(data.config_text)}</pre>"))
    if data.versions:
        parts.append(_folded("Library versions (newest checkpoint)", tables.versions_table(data)))
    return "".join(parts)


def _subtitle(data: RunData) -> str:
    steps = f"{data.last_step} steps" if data.last_step else "no steps yet"
    grown = {0: "no transition", 1: "1 transition"}.get(len(data.transitions), f"{len(data.transitions)} transitions")
    return f"growmoe run: {steps}, {grown}"


def _figure(figure: "Figure | None", name: str, title: str, note: str) -> str:
    if figure is None:
        return ""
    picture = to_svg(figure, name, f"{title}: {note}")
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(note)}</figcaption>{picture}</figure>"


def _plots(figures: list[str]) -> str:
    figures = [figure for figure in figures if figure]
    return f"<div class=plots>{''.join(figures)}</div>" if figures else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n" if content else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
