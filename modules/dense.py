"""Training that starts from a dense model."""

from modules.config import ModelConfig
from modules.errors import InputError
from modules.language_model import LanguageModel


class DenseLM(LanguageModel):
    """A language model that starts dense; a transition may make it larger, or routed."""

    @staticmethod
    def check_start(architecture: ModelConfig) -> None:
        """Raise `InputError` for an architecture with experts."""
        if architecture.moe is not None:
            raise InputError(
                f"DenseLM got moe with num_experts={architecture.moe.num_experts}, and starts without experts; "
                "use --model MoELM, or remove architecture.moe"
            )
