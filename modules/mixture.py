"""Training that starts from a mixture of experts."""

from modules.config import ModelConfig
from modules.errors import InputError
from modules.language_model import LanguageModel


class MoELM(LanguageModel):
    """A language model that starts with routed feed-forward layers."""

    @staticmethod
    def check_start(architecture: ModelConfig) -> None:
        """Raise `InputError` for an architecture without experts."""
        if architecture.moe is None:
            raise InputError(
                "MoELM got an architecture without experts (moe is empty), and needs at least one routed layer; "
                "set architecture.moe.num_experts, or use --model DenseLM"
            )
