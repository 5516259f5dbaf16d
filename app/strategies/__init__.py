"""How several processes train one network."""

from app.strategies.expert_parallel import ExpertParallelStrategy

__all__ = ["ExpertParallelStrategy"]
