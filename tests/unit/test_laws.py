"""Scaling laws against what their papers print, and the planner's arithmetic."""

import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from app.cli import main
from app.commands.laws import plan_budget
from app.laws.fairseq import speed_up, training_flops
from app.laws.fitting import EXPERTS_MOST, EXPERTS_START, fit, read_runs
from app.laws.law import at_size, best_setting, optimum
from app.laws.printed import (
    ABNAR,
    CHINCHILLA,
    CLARK,
    CLARK_CONSTANTS,
    FINE_GRAINED,
    HOFFMANN,
    JOINT,
    LAWS,
    SPARSE,
    clark_effective_parameters,
    fine_grained_flops,
    fine_grained_sizes,
    saturated,
    sparse_equivalent,
)
from app.laws.serving import Serving, best_at_cost, cheapest_at_loss, total_parameters
from modules.errors import InputError

EXPERTS = (1, 2, 4, 8, 16, 32)


def test_joint_law_gives_the_printed_sizes() -> None:
    """Table 1 at 1e22: active parameters and tokens, in billions."""
    printed = [(18.9, 88), (17.4, 96), (15.9, 105), (14.5, 115), (13.3, 126), (12.3, 136)]
    for experts, (parameters, tokens) in zip(EXPERTS, printed, strict=True):
        best = optimum(JOINT, 1e22, experts=experts)
        assert best.parameters / 1e9 == pytest.approx(parameters, abs=0.06)
        assert best.tokens / 1e9 == pytest.approx(tokens, abs=0.6)


@pytest.mark.parametrize("flops", [1e20, 1e21, 1e22])
def test_more_experts_are_smaller_and_better_at_each_budget(flops: float) -> None:
    found = [optimum(JOINT, flops, experts=experts) for experts in EXPERTS]
    assert [one.loss for one in found] == sorted((one.loss for one in found), reverse=True)
    assert [one.parameters for one in found] == sorted((one.parameters for one in found), reverse=True)


def test_chinchilla_by_its_refit_is_near_twenty_tokens() -> None:
    refit, printed = optimum(CHINCHILLA, 5.76e23), optimum(HOFFMANN, 5.76e23)
    assert refit.parameters / 1e9 == pytest.approx(72, abs=1) and 17 < refit.tokens_per_parameter < 20
    assert printed.parameters / 1e9 == pytest.approx(32, abs=1) and printed.tokens_per_parameter > 90


@pytest.mark.parametrize("flops", [1e18, 1e21, 5e24])
def test_the_numeric_optimum_is_the_closed_form(flops: float) -> None:
    a, b, alpha, beta = 482.01, 2085.43, 0.3478, 0.3658
    size = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    assert optimum(CHINCHILLA, flops).parameters == pytest.approx(size, rel=1e-5)
    near = optimum(CHINCHILLA, flops)
    for factor in (0.99, 1.01):
        n = near.parameters * factor
        assert CHINCHILLA.loss(n, flops / 6 / n) > near.loss


def test_fine_grained_law_gives_table_2() -> None:
    """Losses within what the coefficients' rounding leaves, FLOPs those of the table (arXiv 2402.07871, table 2)."""
    table = [
        (1e8, 4.37e9, 8, 3.133, 2.95e18),
        (1e9, 28.94e9, 16, 2.491, 1.93e20),
        (3e9, 72.9e9, 16, 2.245, 1.41e21),
        (7e9, 137.6e9, 32, 2.076, 6.46e21),
        (70e9, 941e9, 32, 1.694, 4.16e23),
        (300e9, 2.96e12, 64, 1.503, 5.69e24),
        (1e12, 7.94e12, 64, 1.367, 4.97e25),
    ]
    for dense, tokens, granularity, loss, flops in table:
        _, parameters = fine_grained_sizes(dense)
        assert parameters == pytest.approx(43 * dense)
        assert FINE_GRAINED.loss(parameters, tokens, granularity=granularity) == pytest.approx(loss, abs=0.025)
        spent = fine_grained_flops(dense, tokens, granularity)
        assert spent == pytest.approx(flops, rel=0.01)
        assert FINE_GRAINED.flops_per_token(parameters, granularity=granularity) == pytest.approx(spent / tokens)
        value, best = best_setting(FINE_GRAINED, spent)  # of the budget alone: the table's granularity, size and tokens
        assert value == granularity and best.loss == pytest.approx(loss, abs=0.025)
        assert FINE_GRAINED.sizes["dense equivalent"](best.parameters, value) == pytest.approx(dense, rel=0.03)
        assert best.tokens == pytest.approx(tokens, rel=0.03)


def test_clark_saturates_and_counts_effective_parameters() -> None:
    for _, _, _, _, start, most in CLARK_CONSTANTS.values():
        assert saturated(1, start, most) == pytest.approx(start)
        assert saturated(1e9, start, most) == pytest.approx(most, rel=1e-5)
    assert clark_effective_parameters(5e6, 128) / 1e6 == pytest.approx(52, abs=1)  # the paper's figure shows 55
    for router in CLARK_CONSTANTS:
        same = clark_effective_parameters(1e8, 1, router)
        assert same == pytest.approx(1e8)
        better = CLARK.loss(1e8, experts=64, router=router)
        dense = CLARK.loss(clark_effective_parameters(1e8, 64, router), experts=1, router=router)
        assert better == pytest.approx(dense) and 1.5 < better < CLARK.loss(1e8, router=router)


def test_clark_spends_a_budget_on_its_fixed_tokens() -> None:
    best = optimum(CLARK, 6 * 3e8 * 130e9, experts=64)
    assert best.parameters == pytest.approx(3e8) and best.tokens == 130e9
    served = optimum(CLARK, (6 * 130e9 + 2 * 4e11) * 3e8, inference_tokens=4e11, experts=64)
    assert served.parameters == pytest.approx(3e8)


def test_optimal_sparsity_falls_with_compute_at_a_fixed_size_and_not_at_a_free_one() -> None:
    fixed = [best_setting(ABNAR, flops, 1e10)[0] for flops in (1e21, 1e22, 1e23)]
    assert fixed == sorted(fixed, reverse=True) and 0.9 < fixed[0] < 0.98 and 0.6 < fixed[-1] < 0.7
    for flops, value in zip((1e21, 1e22, 1e23), fixed, strict=True):
        best = at_size(ABNAR, flops, 1e10, sparsity=value)
        assert 6 * 1e10 * (1 - value) * best.tokens == pytest.approx(flops)
        for near in (value - 0.01, value + 0.01):
            assert at_size(ABNAR, flops, 1e10, sparsity=near).loss > best.loss
        assert best_setting(ABNAR, flops)[0] == pytest.approx(0.98)  # a free size: as sparse as the law goes


@pytest.mark.parametrize(("sparsity", "times"), [(0.0, 1.0), (0.5, 1.59), (0.7, 2.02), (0.75, 2.16), (0.9, 2.76)])
def test_a_sparse_model_is_as_good_as_a_larger_dense_one(sparsity: float, times: float) -> None:
    """Frantar et al.'s gains at the same weights that are not zero."""
    equivalent = sparse_equivalent(1e7, sparsity)
    assert equivalent / 1e7 == pytest.approx(times, abs=0.005)
    assert SPARSE.loss(1e7, 3e10, sparsity=sparsity) == pytest.approx(SPARSE.loss(equivalent, 3e10))


@pytest.mark.parametrize("name", [name for name, law in LAWS.items() if law.fixed_tokens is None])
def test_optima_keep_the_budget_and_no_other_size_is_better(name: str) -> None:
    """Also where FLOPs are the law's own, and where inference takes its share: C = F (D + D_inf / 3)."""
    law = LAWS[name]
    for settings in [{law.knob.name: value} for value in law.knob.values] if law.knob else [{}]:
        for served in (0.0, 1e11):
            best = optimum(law, 1e21, inference_tokens=served, **settings)
            spent = law.flops_per_token(best.parameters, **settings) * (best.tokens + served / 3)
            assert spent == pytest.approx(1e21, rel=1e-9)
            others = [
                at_size(law, 1e21, best.parameters * math.exp(step), served, **settings).loss
                for step in np.linspace(-6, 0.5, 27)
                if law.flops_per_token(best.parameters * math.exp(step), **settings) * served / 3 < 1e21
            ]
            assert best.loss <= min(others) + 1e-12


def test_inference_makes_models_smaller_and_its_closed_form_is_met() -> None:
    """With D = F / 6N - D_inf / 3, the slope over N is zero: alpha A / N^(alpha+1) = beta B / D^(beta+1) F / 6N²."""
    a, b, alpha, beta = 482.01, 2085.43, 0.3478, 0.3658
    sizes = []
    for served in (0.0, 1e11, 1e12, 1e14):
        best = optimum(CHINCHILLA, 1e22, inference_tokens=served)
        sizes.append(best.parameters)
        by_size = alpha * a * best.parameters ** (-alpha - 1)
        by_data = beta * b * best.tokens ** (-beta - 1) * 1e22 / (6 * best.parameters**2)
        assert by_size == pytest.approx(by_data, rel=1e-4)
    assert sizes == sorted(sizes, reverse=True)


def test_the_command_offers_every_law() -> None:
    assert get_args(get_type_hints(plan_budget)["law"]) == tuple(LAWS)


def test_every_law_tells_its_source_and_its_domain() -> None:
    for law in LAWS.values():
        assert "arXiv" in law.source and law.counts and law.domain.ranges
    assert JOINT.domain.warnings(parameters=5e9, experts=8) == [
        "parameters=5e+09 is outside of what the law was fitted on (up to 2.7e+09)"
    ]
    assert JOINT.domain.warnings(parameters=1e9, experts=8, tokens=1e10) == []


# -- serving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "parameters", "share", "tokens", "total"),
    [(8, 4.56, 0.32, 365, 26.7), (16, 2.54, 0.19, 655, 29.0), (32, 1.61, 0.13, 1036, 36.1)],
)
def test_smaller_mixtures_are_as_good_as_four_experts(
    experts: int, parameters: float, share: float, tokens: float, total: float
) -> None:
    """Yun et al.'s first algorithm on the Joint law at 1e22."""
    base = optimum(JOINT, 1e22, experts=4)
    found = cheapest_at_loss(JOINT, 1e22, experts, base.loss, Serving())
    assert found is not None and found.chosen.loss == pytest.approx(base.loss, abs=1e-9)
    assert found.chosen.parameters / 1e9 == pytest.approx(parameters, abs=0.006)
    assert found.size_share == pytest.approx(share, abs=0.006)
    assert found.chosen.tokens / 1e9 == pytest.approx(tokens, rel=2e-3)
    assert total_parameters(found.chosen.parameters, experts) / 1e9 == pytest.approx(total, abs=0.06)


def test_what_cannot_be_is_none() -> None:
    base = optimum(JOINT, 1e22, experts=8)
    assert cheapest_at_loss(JOINT, 1e22, 1, base.loss, Serving()) is None
    assert best_at_cost(JOINT, 1e22, 8, 1e-9, Serving()) is None


def test_cost_is_kept_and_spent() -> None:
    serving = Serving()
    base = optimum(JOINT, 1e22, experts=4)
    cost = 0.5 * serving.cost(base.parameters, 4)
    found = best_at_cost(JOINT, 1e22, 16, cost, serving)
    assert found is not None and found.cost <= cost * (1 + 1e-9) and found.chosen.loss > found.best.loss
    assert serving.cost(found.chosen.parameters * 1.2, 16) > cost


def test_a_dense_model_reads_all_of_its_weights_and_a_mixture_what_its_batch_touches() -> None:
    serving = Serving(memory_bytes=1e15, prompt=1e-6, output=1e-3)  # room for any batch: products decide
    expected = 2 * 1e9 * 1e6 / (serving.peak_flops * serving.mfu)
    assert serving.cost(1e9, 1) == pytest.approx(expected, rel=0.01)
    costs = [Serving().cost(parameters, 8) for parameters in (1e9, 2e9, 4e9, 8e9)]
    assert costs == sorted(costs)


# -- fairseq -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "width", "is_moe", "zflops"),
    [
        (12, 768, False, 0.36),
        (24, 1024, False, 1.06),
        (24, 2048, False, 3.57),
        (32, 2560, False, 7.08),
        (32, 4096, False, 17.1),
        (40, 5120, False, 32.7),
        (12, 768, True, 0.43),
        (24, 1024, True, 1.30),
        (24, 2048, True, 4.53),
        (32, 4096, True, 22.3),
    ],
)
def test_fairseq_counts(layers: int, width: int, is_moe: bool, zflops: float) -> None:
    """The paper's table, to two digits: 300B tokens."""
    found = training_flops(layers, width, 300e9, is_moe=is_moe) / 1e21
    assert found == pytest.approx(zflops, abs=0.0051 if zflops < 10 else 0.051)


def test_speed_up_factor() -> None:
    curve = [(c, 3 * c**-0.05) for c in (1e18, 1e19, 1e20)]
    for compute, loss in curve:
        assert speed_up(curve, compute, loss) == pytest.approx(1)
    shifted = [(c / 4, loss) for c, loss in curve]
    for compute, loss in shifted:
        assert speed_up(curve, compute, loss) == pytest.approx(4)
    between = math.sqrt(1e18 * 1e19)
    assert speed_up(curve, between / 2, 3 * between**-0.05) == pytest.approx(2)
    with pytest.raises(InputError, match="nothing is extrapolated"):
        speed_up(curve, 1e20, 0.1)
    with pytest.raises(InputError, match="at least 2"):
        speed_up(curve[:1], 1e20, 0.3)


# -- laws of one's own -------------------------------------------------------------------------------------------------


def write_runs(path: Path, form: str, noise: float, seed: int = 0) -> Path:
    """Runs by a known law: 5 sizes x 4 amounts of data (x 3 numbers of experts)."""
    random = np.random.default_rng(seed)
    lines = ["parameters,tokens,experts,loss"]
    for n in (2e7, 6e7, 2e8, 6e8, 2e9):
        for tokens in (1e9, 4e9, 1.6e10, 6.4e10):
            for experts in (1, 8, 32) if form == "mixture" else (1,):
                if form == "mixture":
                    counted = saturated(experts, EXPERTS_START, EXPERTS_MOST)
                    inner = 60 / n**0.18 + 0.5 / counted**0.6 + 60 / tokens**0.2 + 1.3
                    loss = inner * math.exp(0.001 * math.log(n) * math.log(counted))
                else:
                    loss = CHINCHILLA.loss(n, tokens)
                lines.append(f"{n},{tokens},{experts},{loss * math.exp(random.normal(0, noise))}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_dense_law_is_recovered_from_its_runs(tmp_path: Path) -> None:
    rows = read_runs(write_runs(tmp_path / "runs.csv", "dense", 0.0), "dense")
    found = fit(rows, "dense", num_bootstrap=2)
    assert found.constants["alpha"][0] == pytest.approx(0.3478, abs=2e-3)
    assert found.constants["beta"][0] == pytest.approx(0.3658, abs=2e-3)
    assert math.exp(found.constants["log E"][0]) == pytest.approx(1.8172, abs=2e-3)
    assert found.rmse < 1e-4
    assert found.law.loss(7e9, 1.4e11) == pytest.approx(CHINCHILLA.loss(7e9, 1.4e11), abs=2e-3)
    assert found.law.domain.warnings(parameters=7e9, tokens=1e10) != []


def test_intervals_hold_the_truth_and_noise_widens_them(tmp_path: Path) -> None:
    widths = []
    for noise in (0.001, 0.01):
        rows = read_runs(write_runs(tmp_path / "runs.csv", "dense", noise), "dense")
        value, low, high = fit(rows, "dense", num_bootstrap=20).constants["log E"]
        assert low <= value <= high
        assert low - 0.05 <= math.log(1.8172) <= high + 0.05
        widths.append(high - low)
    assert widths[1] > 2 * widths[0]


def test_a_mixture_law_predicts_what_it_was_not_shown(tmp_path: Path) -> None:
    rows = read_runs(write_runs(tmp_path / "runs.csv", "mixture", 0.002), "mixture")
    found = fit(rows, "mixture", num_bootstrap=2)
    for experts in (1, 8, 32):
        counted = saturated(experts, EXPERTS_START, EXPERTS_MOST)
        inner = 60 / 3e9**0.18 + 0.5 / counted**0.6 + 60 / 1e11**0.2 + 1.3
        truth = inner * math.exp(0.001 * math.log(3e9) * math.log(counted))
        assert found.law.loss(3e9, 1e11, experts=experts) == pytest.approx(truth, abs=0.01)


def test_fit_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_runs(tmp_path / "runs.csv", "dense", 0.001)
    main(["plan", "fit", str(path), "--flops", "1e19", "--bootstrap", "3"])
    printed = capsys.readouterr().out
    assert "alpha" in printed and "1e+19 FLOPs buy" in printed and "20 runs" in printed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read"),
        ("parameters,loss\n1,2\n", "no column 'tokens'"),
        ("parameters,tokens,loss\n1e6,1e9,x\n", "line 2: loss='x' is no number above 0"),
        ("parameters,tokens,loss\n1e6,1e9,-1\n", "loss='-1' is no number above 0"),
        ("parameters,tokens,loss\n1e6,1e9,3\n", "1 runs cannot tell 5 constants; give at least 6"),
    ],
)
def test_runs_that_tell_nothing_are_refused(
    text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["plan", "fit", str(path)])
    assert ended.value.code == 2 and told in capsys.readouterr().err
