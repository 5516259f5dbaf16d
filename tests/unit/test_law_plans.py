"""What the planner says: sizes under limits, advice on growth, and the commands."""

import math

import pytest

from app.cli import main
from app.laws.budget import budget_rows
from app.laws.growth import Owned, growth_notes
from app.laws.law import Knob, Law, optimum
from app.laws.limits import Limits, within
from app.laws.printed import (
    ABNAR,
    CHINCHILLA,
    CLARK,
    JOINT,
    LAWS,
)

EXPERTS = (1, 2, 4, 8, 16, 32)


# -- limits ------------------------------------------------------------------------------------------------------------

PRINTED = {1e21: (16, 32, 32), 1e22: (4, 16, 32), 1e23: (1, 8, 32), 1e24: (1, 1, 16)}
"""Best numbers of experts within 24, 80 and 640 GB; 32 stands for "32 or more" (arXiv 2502.05172, table 2)."""


def best_experts(limits: dict[str, float]) -> dict[float, tuple[int, ...]]:
    """The best of `EXPERTS` within the memory of the table."""
    return {
        flops: tuple(
            min(EXPERTS, key=lambda count: within(JOINT, flops, count, Limits(memory_bytes=memory, **limits)).loss)
            for memory in (24e9, 80e9, 640e9)
        )
        for flops in PRINTED
    }


@pytest.mark.parametrize(
    "limits", [{}, {"width_per_layer": 128}, {"vocab_size": 32000}, {"kv_tokens": 2048}, {"vocab_size": 1}]
)
def test_memory_gives_most_of_the_printed_numbers_of_experts(limits: dict[str, float]) -> None:
    """Nine of twelve cells, ten without embeddings; where we differ, by one doubling."""
    first = 16 if limits == {"vocab_size": 1} else 32
    found = best_experts(limits)
    assert found == {1e21: (first, 32, 32), 1e22: (4, 16, 32), 1e23: (1, 4, 32), 1e24: (1, 1, 8)}
    pairs = [pair for flops in PRINTED for pair in zip(found[flops], PRINTED[flops], strict=True)]
    assert all(ours in (theirs / 2, theirs, theirs * 2) for ours, theirs in pairs)


def test_a_limit_that_binds_is_filled_and_one_that_does_not_is_free() -> None:
    limits = Limits(memory_bytes=80e9, kv_tokens=4096)
    for experts in EXPERTS:
        free, bound = optimum(JOINT, 1e22, experts=experts), within(JOINT, 1e22, experts, limits)
        used = limits.used_bytes(bound.parameters, experts)
        if limits.used_bytes(free.parameters, experts) > 80e9:
            assert used == pytest.approx(80e9, rel=1e-6) and bound.loss > free.loss
        else:
            assert used < 80e9 and bound.parameters == pytest.approx(free.parameters, rel=1e-6)
    losses = [within(JOINT, 1e22, 16, Limits(memory_bytes=memory)).loss for memory in (1e10, 2e10, 4e10, 1e11, 1e13)]
    assert losses == sorted(losses, reverse=True)


def test_the_shape_has_the_parameters_and_one_expert_is_dense() -> None:
    for limits in (Limits(), Limits(width_per_layer=128, vocab_size=32000)):
        for parameters in (1e7, 1e9, 1e11):
            d = limits.width(parameters)
            layers, embeddings = d / limits.width_per_layer, 2 * limits.vocab_size * d
            assert embeddings + 13 * layers * d**2 == pytest.approx(parameters)
            assert limits.all_parameters(parameters, 1) == pytest.approx(parameters)
            assert limits.all_parameters(parameters, 8) == pytest.approx(embeddings + 76 * layers * d**2)
            rate = math.exp(8.39 - 0.81 * math.log(parameters - embeddings) - 0.25 * math.log(8))
            assert limits.learning_rate(parameters, 8) == pytest.approx(rate)
    with_keys = Limits(kv_tokens=1000)
    width = with_keys.width(1e9)
    assert with_keys.used_bytes(1e9, 1) - Limits().used_bytes(1e9, 1) == pytest.approx(4 * 1000 * width**2 / 64)


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_up_to_eight_experts_beat_a_dense_model_of_as_many_parameters_in_all(experts: int) -> None:
    """The paper's rule: trained on E times the tokens of the compute-optimal dense model of the same total size."""
    for flops in (1e20, 1e21):
        dense = optimum(JOINT, flops, experts=1)
        active = Limits(memory_bytes=2 * dense.parameters).largest(experts)
        assert JOINT.loss(active, experts * dense.tokens, experts=experts) < dense.loss


# -- growth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chinchilla", "hoffmann", "joint", "abnar", "sparse"])
def test_tokens_and_parameters_are_balanced_where_the_size_is_optimal(name: str) -> None:
    law = LAWS[name]
    assert law.dense is not None
    best = optimum(law, 1e21, **law.dense)
    owned = Owned(law, best.parameters, 1e9)
    assert owned.balanced_tokens() == pytest.approx(best.tokens, rel=1e-3)
    assert owned.spent == pytest.approx(6e9 * best.parameters)


def test_going_on_wins_until_it_is_even() -> None:
    owned = Owned(CHINCHILLA, 1e9, 2e10)
    even = owned.break_even()
    assert even is not None
    assert owned.continued(even).loss == pytest.approx(optimum(CHINCHILLA, even).loss, abs=1e-6)
    assert owned.continued(even / 2).loss < optimum(CHINCHILLA, even / 2).loss
    assert owned.continued(even * 2).loss > optimum(CHINCHILLA, even * 2).loss
    further = [Owned(CHINCHILLA, 1e9, tokens).break_even() or 0.0 for tokens in (1e10, 4e10, 1.6e11)]
    assert further == sorted(further)  # what has been spent is sunk
    assert owned.gain_of_doubling == pytest.approx(CHINCHILLA.loss(1e9, 2e10) - CHINCHILLA.loss(1e9, 4e10))


def test_growth_advice_names_its_rules_of_thumb() -> None:
    notes = growth_notes(Owned(JOINT, 1e9, 2e9), 6e18)  # half of what the model has cost
    assert any("no law here" in note for note in notes)
    thumbs = [note for note in notes if note.startswith("rule of thumb")]
    assert "0.5 times that: upcycling" in thumbs[0] and "more than the whole budget pays" in thumbs[1]
    large = growth_notes(Owned(JOINT, 1e9, 2e10), 1e21)
    assert "8.3 times that: the mixture from scratch" in large[4] and "by 4 to 4B after 29.3B tokens" in large[5]
    assert (
        "past that by" in large[0] and "not for budgets below 1e+18" in growth_notes(Owned(JOINT, 1e6, 1e8), 1e15)[-1]
    )


# -- the commands ------------------------------------------------------------------------------------------------------


def test_commands_print_what_the_laws_say(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "budget", "--flops", "1e22", "--law", "joint", "--experts", "[1, 32]"])
    printed = capsys.readouterr().out
    assert "18.9B" in printed and "12.3B" in printed and "arXiv 2502.05172" in printed
    assert "parameters=1.89e+10 is outside of what the law was fitted on" in printed
    main(["plan", "budget", "--device_hours", "1000", "--peak_flops", "1e15", "--mfu", "0.5"])
    assert "1.8e+21 training FLOPs" in capsys.readouterr().out
    main(["plan", "moe", "--budget", "1e22", "--serving.prompt", "100"])
    printed = capsys.readouterr().out
    assert "4.56B" in printed and "32%" in printed and "cannot be" in printed and "not a measurement" in printed


def lines_of(words: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `plan` prints."""
    main(["plan", *words.split()])
    return capsys.readouterr().out.splitlines()


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]


@pytest.mark.parametrize(
    ("words", "header", "row", "note"),
    [
        ("--flops 1.93e20 --law fine_grained", "dense equivalent", ["16", "43.9B", "28.3B"], "granularity 16"),
        ("--flops 1e20 --law fine_grained --granularity 8", "granularity", ["8"], "outside of what the law"),
        ("--flops 1e20 --law clark --experts 128", "as good as dense", ["128", "128M", "130B"], "knows no tokens"),
        ("--flops 1e22 --law abnar --parameters 1e10", "active", ["0.8414", "10B", "1.05T"], "68 % (R²)"),
        ("--flops 1e19 --law abnar", "active", ["0.98"], "least loss at sparsity 0.98; the largest here"),
        ("--flops 1e19 --law sparse --sparsity [0.75]", "with zeros", ["0.75"], "FLOPs are ideal"),
        ("--flops 1e22 --law joint --limits.memory_bytes 80e9", "memory, GB", ["16"], "least loss at experts 16"),
        (
            "--flops 1e22 --law joint --limits.inference_tokens 1e12",
            "learning rate",
            ["1", "2.4B", "362B"],
            "and infer",
        ),
        ("--flops 1e21 --law hoffmann", "loss", ["1.82B", "91.4B"], "arXiv 2203.15556"),
    ],
)
def test_the_table_of_a_law(
    words: str, header: str, row: list[str], note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(f"budget {words}", capsys)
    names = next(cells_of(line) for line in lines if "tokens per parameter" in line)
    assert header in names
    found = next(cells_of(line) for line in lines if line.startswith("│") and cells_of(line)[: len(row)] == row)
    assert len(found) == len(names) and all(found)
    assert note in " ".join(" ".join(lines).split())


def test_the_serving_table_has_a_name_for_each_column(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of("moe --budget 1e22 --experts [8]", capsys)
    names, row = (next(cells_of(line) for line in lines if line.startswith(mark)) for mark in ("┃", "│"))
    assert dict(zip(names, row, strict=True)) | {"cost": "", "as cheap": "", "loss": ""} == {
        "experts": "8", "as good as the base": "4.56B", "of its optimum": "32%", "tokens": "365B",
        "all parameters": "26.7B", "cost": "", "as cheap": "", "loss": "",
    }  # fmt: skip
    assert any("parameters=1.45e+10 is outside" in line for line in lines)


def test_growth_is_told_next_to_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    words = "budget --flops 1e21 --law joint --experts [1,8] --have_parameters 1e9 --have_tokens 2e10"
    lines = lines_of(words, capsys)
    rows = {cells_of(line)[0]: cells_of(line)[1:] for line in lines if line.startswith("│")}
    assert rows["as it is"] == ["1B", "20B", "20", f"{JOINT.loss(1e9, 2e10):.4f}"]
    assert rows["going on"] == ["1B", "187B", "187", f"{JOINT.loss(1e9, 2e10 + 1e21 / 6e9):.4f}"]
    assert rows["from scratch, experts 8"][0] == "3.79B"
    assert sum("rule of thumb" in line for line in lines) == 2


def test_knobs_and_rows() -> None:
    values = [row.value for row in budget_rows(ABNAR, 1e22, None, 1e10, Limits())]
    assert values == sorted(values) and len(values) == len(ABNAR.knob.values) + 1  # type: ignore[union-attr]
    law = Law("none", "arXiv", "all", lambda n, d, k: 1 / n + 1 / d, knob=Knob("k", (1, 2), dense=None))
    assert law.dense is None and CLARK.dense is None and CHINCHILLA.dense == {} and JOINT.dense == {"experts": 1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["budget"], "flops and device_hours: neither given"),
        (["budget", "--flops", "1e21", "--device_hours", "3"], "both given"),
        (["budget", "--flops", "-1"], "flops=-1 is no budget"),
        (["budget", "--flops", "1e21", "--experts", "[8]"], "set law=joint"),
        (["budget", "--flops", "1e21", "--law", "joint", "--experts", "[0]"], "experts=0 must be at least 1"),
        (["budget", "--flops", "1e21", "--experts", "[]", "--law", "joint"], "experts=[] holds no value"),
        (["budget", "--flops", "1e21", "--law", "joint", "--granularity", "4"], "set law=fine_grained"),
        (["budget", "--flops", "1e21", "--law", "fine_grained", "--granularity", "0.5"], "must be at least 1"),
        (["budget", "--flops", "1e21", "--law", "abnar", "--sparsity", "1"], "at least 0 and below 1; 0 is a dense"),
        (["budget", "--flops", "1e21", "--law", "clark", "--parameters", "1e9"], "leave parameters out"),
        (["budget", "--flops", "1e21", "--parameters", "0"], "parameters=0.0 must be a finite number above 0"),
        (["budget", "--flops", "-1", "--parameters", "1e9"], "flops=-1 is no budget"),
        (["budget", "--flops", "1e21", "--limits.memory_bytes", "8e10"], "set law=joint (experts=1 is dense)"),
        (
            ["budget", "--flops", "1e21", "--law", "joint", "--parameters", "1e9", "--limits.memory_bytes", "8e10"],
            "limits.memory_bytes sets; leave parameters out",
        ),
        (["budget", "--flops", "1e21", "--limits.memory_bytes", "0"], "limits.memory_bytes=0"),
        (["budget", "--flops", "1e21", "--limits.inference_tokens", "-1"], "limits.inference_tokens=-1"),
        (
            ["budget", "--flops", "1e21", "--parameters", "1e10", "--limits.inference_tokens", "1e12"],
            "leave none to train; give more FLOPs or fewer parameters",
        ),
        (["budget", "--flops", "1e21", "--law", "joint", "--limits.memory_bytes", "80"], "give bytes, such as 80e9"),
        (
            [
                "budget",
                "--flops",
                "1e21",
                "--law",
                "joint",
                "--limits.memory_bytes",
                "8e10",
                "--limits.kv_tokens",
                "1e20",
            ],
            "holds no model of 1 experts; give more memory",
        ),
        (["budget", "--flops", "1e21", "--limits.inference_tokens", "1e40"], "at any size; give more FLOPs, or fewer"),
        (["budget", "--flops", "1e21", "--have_tokens", "1e9"], "one alone is no trained model; give both"),
        (["budget", "--flops", "1e21", "--have_tokens", "0", "--have_parameters", "1e9"], "have_tokens=0"),
        (
            ["budget", "--flops", "1e21", "--law", "clark", "--have_tokens", "1e9", "--have_parameters", "1e9"],
            "set law=chinchilla or law=joint",
        ),
        (["budget", "--flops", "1e21", "--law", "kaplan"], "law"),
        (["moe", "--budget", "0"], "flops=0 is no budget"),
        (["moe", "--budget", "1e22", "--base", "0"], "experts=0 must be at least 1"),
        (["moe", "--budget", "1e22", "--serving.mfu", "0"], "serving.mfu=0"),
        (["moe"], "budget"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and told in err and len(err.strip().splitlines()) == 1
