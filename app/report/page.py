"""The report of a run as one HTML document."""

from html import escape

from app.report import heatmaps, plots, tables, words
from app.report.data import RunData
from app.report.document import beside, document, figure_block, folded, section
from app.report.drawing import drawing_style
from app.report.load import read_languages, read_load

SYNTHETIC = "data: trained and measured on an invented bilingual world that the project makes itself; not real text."
MAX_MAPS = 8
"""routed layers that have a heat map over the run"""


def render_page(data: RunData) -> str:
    """The whole document."""
    badge = f"<p class=badge role=note><b>SYNTHETIC</b> {escape(SYNTHETIC)}</p>" if data.is_synthetic else ""
    with drawing_style():
        sections = "".join(_sections(data))
    body = f"<div class=cards>{tables.headline_cards(data)}</div>\n{sections}"
    return document(data.run_dir.resolve().name, _subtitle(data), body, badge)


def _sections(data: RunData) -> list[str]:
    """Each section, or an empty string where the run has nothing for it."""
    return [
        section("Transitions", tables.transition_table(data) if data.transitions else ""),
        section("Learning", beside(_learning(data))),
        section("Evaluation", _evaluation(data) if data.evaluations else ""),
        section("Expert load", _experts(data)),
        section("Speed and optimizer", beside(_machinery(data))),
        section("Details", _details(data)),
    ]


def _learning(data: RunData) -> list[str]:
    figures = [
        figure_block(
            plots.training_loss(data), "loss", "Training loss", "faint: as logged; strong: smoothed within each stage"
        ),
        figure_block(plots.validation(data), "bpb", "Validation", "bits per byte, lower is better"),
    ]
    for number, figure in enumerate(plots.accuracy(data), start=1):
        figures.append(figure_block(figure, f"accuracy{number}", "Evaluation accuracy", "dashed: chance"))
    figures.append(
        figure_block(plots.parameters(data), "parameters", "Parameters", "all, and those that one token uses")
    )
    return figures


def _evaluation(data: RunData) -> str:
    asked, others = tables.evaluation_tables(data)
    return asked + (folded("Parts of these tasks, and other metrics", others) if others else "")


def _machinery(data: RunData) -> list[str]:
    return [
        figure_block(plots.speed(data), "speed", "Speed", "tokens per second; time of a step in milliseconds"),
        figure_block(plots.optimizer(data), "optimizer", "Optimizer", "learning rate; gradient norm before clipping"),
    ]


def _experts(data: RunData) -> str:
    figures = [
        figure_block(plots.load_variation(data), "variation", "Spread of load", "coefficient of variation; 0 is even"),
        figure_block(plots.load_peak(data), "peak", "Busiest expert", "its load / an even share; 1 is even"),
        figure_block(plots.router(data), "router", "Routers", "entropy of a token's probabilities; size of the logits"),
        figure_block(plots.dropped(data), "dropped", "Dropped choices", "share of the choices that found no slot"),
    ]
    log = read_load(data)
    final = log.final()
    if final is None:
        return beside(figures)
    note = f"{final.summary()} Colour: load / even share; black cross: no token"
    figures.append(figure_block(heatmaps.final_map(final), "load", "Load of every expert at the end", note))
    for language, load in read_languages(data).items():
        about = f"{load.summary()} Validation text in {words.language(language)}."
        picture = heatmaps.final_map(load)
        figures.append(figure_block(picture, f"load-{language}", f"Experts on {words.language(language)} text", about))
    shown = log.layers if len(log.layers) <= MAX_MAPS else final.telling_layers(MAX_MAPS)
    for number, layer in enumerate(shown):
        about = "; ".join(filter(None, ["load / even share over the run", final.layer_summary(layer)]))
        picture = heatmaps.map_over_time(data, log.over_time(layer), final.dead(layer))
        figures.append(figure_block(picture, f"load{number}", f"Experts of layer {layer}", about))
    few = f"Over the run: {len(shown)} of {len(log.layers)} layers, the most uneven ones and some evenly spaced."
    about_few = f"<p class=soft>{few}</p>" if len(shown) < len(log.layers) else ""
    return beside(figures) + about_few + folded("Load by layer at the end, in numbers", tables.load_table(final))


def _details(data: RunData) -> str:
    parts = [folded("Every metric: first, last, lowest, highest", tables.metrics_table(data))] if data.columns else []
    if data.config_text is not None:
        parts.append(folded("Configuration (config.yaml, resolved)", f"<pre>{escape(data.config_text)}</pre>"))
    if data.versions:
        parts.append(folded("Library versions (newest checkpoint)", tables.versions_table(data)))
    return "".join(parts)


def _subtitle(data: RunData) -> str:
    steps = f"{data.last_step} steps" if data.last_step else "no steps yet"
    grown = {0: "no transition", 1: "1 transition"}.get(len(data.transitions), f"{len(data.transitions)} transitions")
    return f"growmoe run: {steps}, {grown}"
