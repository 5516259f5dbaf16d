"""What a validation measures: the losses of each language, and how it uses the experts.

Letters: N routed layers, E experts.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from modules.functional.routing import RoutingStats
from modules.metrics import TextLoss
from modules.routing_metrics import ExpertChoices, language_distance

FIGURES = ("bpb", "loss", "perplexity")
"""what is measured of each language"""
TOGETHER = ("loss", "perplexity")
"""what is measured of all languages together"""
DISTANCE = "moe/language_distance"


class Validation:
    """One pass over the validation samples.

    Args:
        languages: in the order of their loaders.
        device: where the sums are.
    """

    def __init__(self, languages: Iterable[str], device: torch.device | str = "cpu") -> None:
        self.languages = list(languages)
        self._device = device
        self._losses = [TextLoss().to(device) for _ in self.languages]
        self._together = TextLoss().to(device)
        self._choices: list[ExpertChoices] = []

    def add(
        self, place: int, nats: Tensor, num_tokens: int, num_bytes: Tensor, stats: Sequence[RoutingStats] = ()
    ) -> None:
        """Add one batch.

        Args:
            place: its language's.
            nats: the sum of its token losses.
            num_tokens: its targets.
            num_bytes: UTF-8 bytes that they spell.
            stats: of each routed layer.
        """
        for meter in (self._losses[place], self._together):
            meter.update(nats, num_tokens, num_bytes)
        if stats:
            counts_NE = torch.stack([layer.tokens_per_expert_E for layer in stats])
            if not self._choices:
                self._choices = [ExpertChoices(*counts_NE.shape).to(self._device) for _ in self.languages]
            self._choices[place].update(counts_NE)

    def metrics(self) -> dict[str, float]:
        """`val/<figure>_<language>` and `val/<figure>`; for experts `moe/language_distance`. All ranks together."""
        found = {f"val/{name}": value for name, value in self._together.compute().items() if name in TOGETHER}
        for language, meter in zip(self.languages, self._losses, strict=True):
            found |= {f"val/{name}_{language}": value for name, value in meter.compute().items()}
        metrics = {name: value.item() for name, value in found.items()}
        counts = list(self.expert_choices().values())
        if len(counts) > 1:
            metrics[DISTANCE] = language_distance(counts)
        return metrics

    def expert_choices(self) -> dict[str, Tensor]:
        """By language, how often each expert was chosen [N, E]; empty for a dense model. All ranks together."""
        return {language: meter.compute().cpu() for language, meter in zip(self.languages, self._choices, strict=False)}


def validation_names(languages: Iterable[str]) -> set[str]:
    """The losses that a validation measures."""
    return {f"val/{name}" for name in TOGETHER} | {f"val/{name}_{each}" for each in languages for name in FIGURES}
