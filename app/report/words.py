"""Numbers, transitions and architectures as people write them. Plain text: the page escapes it."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

LANGUAGES = {"en": "English", "zh": "Chinese"}


def language(code: str) -> str:
    """The name of a language, or its code."""
    return LANGUAGES.get(code, code)


def short(value: float | None) -> str:
    """A count in at most four digits and a letter: 1234567 is 1.23M."""
    if not is_number(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}" if abs(value) < 999.5 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def decimal(value: Any, digits: int = 3) -> str:
    """A number with a fixed count of decimals, a dash for none."""
    return f"{value:.{digits}f}" if is_number(value) else "–"


def scientific(value: Any) -> str:
    """A small difference: 0 stays 0, the rest is 1.2e-06 unless it reads well without."""
    if not is_number(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def percent(value: Any) -> str:
    """A share in percent with one decimal."""
    return f"{100 * value:.1f} %" if is_number(value) else "–"


def duration(seconds: Any) -> str:
    """A time span in the two units that matter: 5.2 s, 3 min 20 s, 4 h 05 min, 2 d 3 h."""
    if not is_number(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def listed(value: Any) -> str:
    """A string, a list (a + b) or a mapping (a b, c d) of the logs in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {listed(item)}" for key, item in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return " + ".join(listed(item) for item in value) or "–"
    return "–" if value is None or value == "" else str(value)


def architecture(record: Any) -> str:
    """A model by width x layers and its experts: `144x4`, `144x4, 8 experts top-2 in 2 layers`."""
    if not isinstance(record, Mapping):
        return listed(record)
    text = f"{record.get('dim', '?')}x{record.get('num_layers', '?')}"
    moe = record.get("moe")
    if isinstance(moe, Mapping):
        text += f", {moe.get('num_experts', '?')} experts top-{moe.get('top_k', '?')}{_routed_layers(record, moe)}"
    return text


def architecture_change(source: Any, target: Any) -> str:
    """`96x2 → 144x4`, and where width, depth and experts stay, what else changed."""
    before, after = architecture(source), architecture(target)
    if before == after and isinstance(source, Mapping) and isinstance(target, Mapping):
        changed = [key for key in target if target[key] != source.get(key) and not isinstance(target[key], Mapping)]
        before = ", ".join([before, *(f"{key} {source.get(key)}" for key in changed)])
        after = ", ".join([after, *(f"{key} {target[key]}" for key in changed)])
    return f"{before} → {after}"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a log is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _routed_layers(record: Mapping[str, Any], moe: Mapping[str, Any]) -> str:
    layers, every, depth = moe.get("layers"), moe.get("every"), record.get("num_layers")
    if isinstance(layers, (list, tuple)):
        count = len(set(layers))
    elif isinstance(every, int) and isinstance(depth, int) and every > 0:
        count = depth // every
    else:
        return ""
    return f" in {count} layer{'' if count == 1 else 's'}"
