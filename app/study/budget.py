"""Steps of every run of a study: what the budget of an anchor buys another model."""

from typing import Any

from app.study.design import StudyBudget
from modules.errors import InputError
from modules.functional.budget import Mode, RunCost, StageCost, most_steps


def cost_of(measurement: dict[str, Any]) -> RunCost:
    """What the steps of an arm cost, from a record of `growmoe measure`.

    Raises:
        InputError: a stage that begins at a plateau: only the run can tell what it costs.
    """
    tokens, stages = measurement["tokens_per_step"], []
    for number, stage in enumerate(measurement["stages"]):
        if number and not stage["trigger"]:
            raise InputError(
                f"growth stage {number} begins at a plateau, so that no budget can be worked out; give at_fraction"
            )
        stages.append(
            StageCost(
                flops=stage["flops_per_token"] * tokens,
                parameters=stage["parameters"]["active_non_embedding"],
                seconds=stage["step_s"],
                trigger=stage["trigger"] or {},
                transition=stage["transition_s"],
            )
        )
    return RunCost(stages, tokens, measurement["machine"]["devices"])


def anchor_steps(anchor: RunCost, size: str, budget: StudyBudget) -> int:
    """Steps of the anchor's run."""
    seconds = budget.seconds_of(size)
    if seconds is not None:
        return most_steps(seconds, anchor.accelerator_seconds)
    return round(budget.tokens_per_parameter * anchor.parameters / anchor.tokens_per_step)


def arm_steps(arm: RunCost, anchor: RunCost, size: str, mode: Mode, budget: StudyBudget) -> int:
    """Steps of an arm's run: the most that cost no more than the anchor's.

    Args:
        arm: may be the anchor itself.
        anchor: that of the size.
        size: its name.
        mode: what must not cost more.
    """
    if mode == "own_chinchilla":
        return round(budget.tokens_per_parameter * arm.parameters / arm.tokens_per_step)
    steps = anchor_steps(anchor, size, budget)
    if mode == "tokens":
        return steps * anchor.tokens_per_step // arm.tokens_per_step
    if mode == "flops":
        return most_steps(anchor.flops(steps), arm.flops)
    return most_steps(anchor.accelerator_seconds(steps), arm.accelerator_seconds)
