"""How evenly a run used its experts: what `expert_load.jsonl` says, as arrays and in words.

Letters: N routed layers, E experts, S logged steps, W columns of a map over time. Loads are against an even share: 1 is
even, 0 no token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.report import words
from app.report.data import Record, RunData

FINAL_STEPS = 20
"""logged steps at the end of a run that the final load is the mean of"""
MAX_COLUMNS = 400
"""columns of a map over time; neighbouring logged steps share one beyond that"""
NAMED = 8
"""experts that a sentence names before it counts the rest"""


@dataclass(frozen=True)
class FinalLoad:
    """The load of every expert at the end of a run: 1 is an even share, 0 no token."""

    layers: tuple[str, ...]
    ratios_NE: np.ndarray
    """NaN where a layer has fewer experts than another"""
    first_step: int
    last_step: int
    num_steps: int
    """logged steps that it is the mean of"""

    @property
    def cv_N(self) -> np.ndarray:
        """Coefficient of variation over each layer's experts."""
        return np.nanstd(self.ratios_NE, axis=1)

    @property
    def peak_N(self) -> np.ndarray:
        """Load of each layer's busiest expert."""
        return np.nanmax(self.ratios_NE, axis=1)

    @property
    def least_N(self) -> np.ndarray:
        """Load of each layer's least used expert."""
        return np.nanmin(self.ratios_NE, axis=1)

    def dead(self, layer: str) -> list[int]:
        """Experts of a layer that got no token; none for a layer that the final network does not route."""
        rows_E = [row for name, row in zip(self.layers, self.ratios_NE, strict=True) if name == layer]
        return [int(expert) for row in rows_E for expert in np.flatnonzero(row == 0)]

    def telling_layers(self, most: int) -> list[str]:
        """At most so many layers, in order: half of them those with most dead experts or largest variation, the rest
        evenly spaced."""
        worst = sorted(range(len(self.layers)), key=lambda n: (len(self.dead(self.layers[n])), self.cv_N[n]))[::-1]
        chosen = set(worst[: most // 2])
        others = [n for n in range(len(self.layers)) if n not in chosen]
        places = np.linspace(0, len(others) - 1, min(most - len(chosen), len(others))).round().astype(int)
        return [self.layers[n] for n in sorted(chosen | {others[place] for place in places})]

    def summary(self) -> str:
        """The whole in words, for those who cannot see the picture."""
        experts = int(np.isfinite(self.ratios_NE).sum())
        uneven, busy = int(self.cv_N.argmax()), int(self.peak_N.argmax())
        busiest = int(np.nanargmax(self.ratios_NE[busy]))
        dead = {layer: self.dead(layer) for layer in self.layers if self.dead(layer)}
        several = f" (mean of {len(self.layers)} layers; most in layer {self.layers[uneven]}: {self.cv_N[uneven]:.2f})"
        text = (
            f"{self.span()}: coefficient of variation {self.cv_N.mean():.2f}{several if len(self.layers) > 1 else ''}. "
        )
        text += f"Busiest: expert {busiest} of layer {self.layers[busy]}, {self.peak_N[busy]:.2f} times an even share. "
        if not dead:
            return text + "Every expert has tokens."
        worst, total = max(dead, key=lambda layer: len(dead[layer])), sum(map(len, dead.values()))
        where = f"{len(dead)} layers, most in layer {worst}" if len(dead) > 1 else f"layer {worst}"
        verb = "is" if total == 1 else "are"
        return text + f"{total} of {experts} experts {verb} without a token, in {where}: {named(dead[worst])}."

    def layer_summary(self, layer: str) -> str:
        """One layer in words; empty for a layer that the final network does not route."""
        if layer not in self.layers:
            return ""
        n = self.layers.index(layer)
        dead = f"no token: {named(self.dead(layer))}" if self.dead(layer) else "every expert has tokens"
        return f"at the end: variation {self.cv_N[n]:.2f}, busiest {self.peak_N[n]:.2f}, {dead}"

    def span(self) -> str:
        """The logged steps that it is about."""
        if self.num_steps == 1:
            return f"Step {self.last_step}"
        return f"Mean of the {self.num_steps} logged steps {self.first_step} to {self.last_step}"


@dataclass(frozen=True)
class LoadOverTime:
    """The load of one layer's experts over the run."""

    edges: np.ndarray
    """borders of the columns on the x axis [W + 1]"""
    ratios_EW: np.ndarray
    """NaN where the layer was not routed, or had fewer experts"""


@dataclass(frozen=True)
class LoadLog:
    """What a run logged of its experts, read once."""

    steps_S: list[int]
    x_S: list[float]
    """where the steps lie on the x axes"""
    loads_S: list[dict[str, np.ndarray]]
    """load of each expert against an even share, by layer"""
    grown_at: list[int]
    """steps of the transitions; what was logged at one of them is of the network before"""

    @property
    def layers(self) -> list[str]:
        """The layers that were routed at any time, in order."""
        return sorted({name for found in self.loads_S for name in found}, key=_layer_order)

    def final(self) -> FinalLoad | None:
        """The mean of the last logged steps of the last network; None when nothing was logged."""
        if not self.steps_S:
            return None
        shape, last_step = _shape(self.loads_S[-1]), self.steps_S[-1]
        begin = max((step for step in self.grown_at if step < last_step), default=-1)
        last: list[int] = []
        for s in range(len(self.steps_S) - 1, -1, -1)[:FINAL_STEPS]:
            if self.steps_S[s] <= begin or _shape(self.loads_S[s]) != shape:
                break
            last.append(s)
        layers = tuple(sorted(shape, key=_layer_order))
        means = {layer: np.mean([self.loads_S[s][layer] for s in last], axis=0) for layer in layers}
        return FinalLoad(layers, _stacked(means, layers), self.steps_S[last[-1]], last_step, len(last))

    def over_time(self, layer: str) -> LoadOverTime:
        """One layer's load, from the first to the last logged step that has it."""
        known = [s for s, found in enumerate(self.loads_S) if layer in found]
        shown = range(known[0], known[-1] + 1)
        ratios_SE = np.full((len(shown), max(len(self.loads_S[s][layer]) for s in known)), np.nan)
        for s in known:
            ratios_SE[s - shown[0], : len(self.loads_S[s][layer])] = self.loads_S[s][layer]
        edges = _edges(np.array([self.x_S[s] for s in shown]))
        starts = np.arange(0, len(shown), -(-len(shown) // MAX_COLUMNS))
        present_SE = np.isfinite(ratios_SE)
        counts_WE = np.add.reduceat(present_SE.astype(int), starts)
        sums_WE = np.add.reduceat(np.where(present_SE, ratios_SE, 0.0), starts)
        with np.errstate(invalid="ignore"):
            ratios_EW = (sums_WE / counts_WE).T
        return LoadOverTime(np.append(edges[starts], edges[-1]), ratios_EW)


def read_load(data: RunData) -> LoadLog:
    """The records of `expert_load.jsonl`, less those that hold no shares."""
    records = [(record, _loads(record)) for record in data.expert_load]
    records = [(record, found) for record, found in records if found]
    steps = [int(record["step"]) for record, _ in records]
    x = [data.x_of(record) for record, _ in records]
    return LoadLog(steps, x, [found for _, found in records], [int(t["step"]) for t in data.transitions])


def read_languages(data: RunData) -> dict[str, FinalLoad]:
    """The load of every expert in the last validation, by language; empty for a dense model."""
    found: dict[str, FinalLoad] = {}
    record = data.language_load[-1] if data.language_load else {}
    languages = record.get("languages")
    for language, by_layer in languages.items() if isinstance(languages, Mapping) else ():
        loads = _loads({"layers": by_layer})
        if loads:
            shape, step = _shape(loads), int(record["step"])
            layers = tuple(sorted(shape, key=_layer_order))
            found[str(language)] = FinalLoad(layers, _stacked(loads, layers), step, step, 1)
    return found


def named(experts: list[int]) -> str:
    """Experts by number; many are cut short."""
    more = f" and {len(experts) - NAMED} more" if len(experts) > NAMED else ""
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts[:NAMED]))}{more}"


def _loads(record: Record) -> dict[str, np.ndarray]:
    """Load of each layer's experts against an even share; what is no list of shares is passed over."""
    layers = record.get("layers")
    found = layers.items() if isinstance(layers, Mapping) else ()
    return {str(name): np.array(shares, dtype=float) * len(shares) for name, shares in found if _are_shares(shares)}


def _are_shares(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(words.is_number(x) and x >= 0 for x in value)


def _shape(found: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {layer: len(ratios) for layer, ratios in found.items()}


def _stacked(loads: Mapping[str, np.ndarray], layers: Sequence[str]) -> np.ndarray:
    """Layers as rows [N, E], NaN where one has fewer experts."""
    ratios_NE = np.full((len(layers), max(map(len, loads.values()))), np.nan)
    for row, layer in zip(ratios_NE, layers, strict=True):
        row[: len(loads[layer])] = loads[layer]
    return ratios_NE


def _layer_order(name: str) -> tuple[bool, int, str]:
    is_number = name.isdecimal() and name.isascii()
    return (not is_number, int(name) if is_number else 0, name)


def _edges(centres: np.ndarray) -> np.ndarray:
    """Borders between cells around ascending centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])
