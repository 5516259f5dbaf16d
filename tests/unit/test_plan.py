"""The plan of a run: its stages, their costs, and advice."""

import math

import pytest

from app.plan import PlannedStage, advise, growth_tokens, plan_stages
from modules.config import ModelConfig
from modules.functional.flops import count_parameters, training_flops_per_token
from modules.growth.stage import GrowthStage, GrowthTarget, Plateau
from modules.growth.transition import target_config
from modules.moe_config import MoEConfig

SMALL = ModelConfig(vocab_size=100, dim=32, num_layers=2, num_heads=2)
DEEPER = GrowthStage(GrowthTarget(num_layers=4), at_step=20)
ROUTED = GrowthStage(GrowthTarget(moe=MoEConfig(4, 2)), at_fraction=0.6)


def planned(*recipe: GrowthStage, max_steps: int = 100, is_muon: bool = False) -> list[PlannedStage]:
    architectures = [SMALL]
    for stage in recipe:
        architectures.append(target_config(architectures[-1], stage))
    return plan_stages(architectures, recipe, max_steps, tokens_per_step=64, seq_len=16, is_muon=is_muon)


def test_stages_have_their_steps_tokens_and_costs() -> None:
    first, second, third = planned(DEEPER, ROUTED)
    assert [(s.first_step, s.last_step, s.tokens) for s in (first, second, third)] == [
        (1, 20, 20 * 64),
        (21, 60, 40 * 64),
        (61, 100, 40 * 64),
    ]
    assert third.count == count_parameters(third.config) and third.config.moe is not None
    assert third.flops == third.tokens * training_flops_per_token(third.config, 16)
    assert second.state_bytes == 16 * second.count.total
    with_muon = planned(DEEPER, ROUTED, is_muon=True)[1]
    assert with_muon.state_bytes == 16 * second.count.total - 4 * second.count.non_embedding


def test_what_only_the_run_can_tell_is_left_open() -> None:
    waiting = GrowthStage(GrowthTarget(num_layers=4), at_plateau=Plateau())
    first, second = planned(waiting)
    assert (first.first_step, first.last_step, first.tokens) == (1, None, None)
    assert (second.first_step, second.last_step, second.flops) == (None, 100, None)
    assert advise([first, second]) == []


@pytest.mark.parametrize(("at_step", "verdict"), [(80, "upcycling is the cheaper way"), (20, "from scratch")])
def test_a_mixture_that_costs_more_than_twice_the_dense_model_starts_from_scratch(at_step: int, verdict: str) -> None:
    stage = GrowthStage(GrowthTarget(moe=MoEConfig(4, 2)), at_step=at_step)
    (line,) = advise(planned(stage))
    assert line.startswith("transition 1: the mixture is trained for") and line.endswith(verdict)


@pytest.mark.parametrize(
    ("at_step", "method"), [(5, "stack suits early growth"), (70, "interpolate suits late growth")]
)
def test_early_growth_stacks_and_late_growth_interpolates(at_step: int, method: str) -> None:
    (line,) = advise(planned(GrowthStage(GrowthTarget(num_layers=4), at_step=at_step)))
    assert method in line and "G_stack" not in line  # its law is not for runs of this size


def test_the_law_of_stacking() -> None:
    assert math.log10(growth_tokens(7_000_000_000, 1e23)) == pytest.approx(0.88 * 9.845098 + 163.27 / 23 - 5.74)
    assert 9e9 < growth_tokens(7_000_000_000, 1e23) < 12e9  # about ten billion tokens for 7B


def test_the_command_prints_and_writes_nothing(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    from app.cli import main
    from tests.end_to_end import runs

    config = runs.settings(tmp_path / "run", tmp_path / "world")
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(runs.write(config, tmp_path / "c.yaml"))])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and not (tmp_path / "run").exists()
    assert "16 wide, 2 layers" in shown and "24 wide, 3 layers, 4 experts in 1" in shown and "13-16" in shown
    config["growth"]["stages"][0]["target"]["dim"] = 8
    with pytest.raises(SystemExit) as refused:
        main(["plan", "--config", str(runs.write(config, tmp_path / "bad.yaml"))])
    assert refused.value.code == 2 and "smaller than its source's" in capsys.readouterr().err
