"""The models: `DenseLM` and `MoELM` are two LightningModules around one exchangeable `Transformer`.

They are imported on first use: `modules.config` and the like must not cost the import of Lightning.
"""

from typing import Any

__all__ = ["DenseLM", "MoELM"]


def __getattr__(name: str) -> Any:
    if name == "DenseLM":
        from modules.dense import DenseLM

        return DenseLM
    if name == "MoELM":
        from modules.mixture import MoELM

        return MoELM
    raise AttributeError(f"module 'modules' has no attribute {name!r}")
