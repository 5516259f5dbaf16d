"""The report of a run: what is on the page, what is left out, and that nothing of it is believed."""

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.commands.report import report
from app.metrics_table import MetricsTable, format_number
from app.report import words
from app.report.data import Series, load_run
from app.report.drawing import MAX_POINTS, _label_rows, drawing_style, plain, smooth
from app.report.page import render_page
from modules.errors import InputError
from modules.jsonl import append_jsonl

STEPS, TOKENS_PER_STEP, GROW_AT, UPCYCLE_AT = 600, 4096, 200, 400
SMALL = {"dim": 96, "num_layers": 2, "num_heads": 3, "moe": None}
LARGE = {"dim": 144, "num_layers": 4, "num_heads": 3, "moe": None}
ROUTED = {**LARGE, "moe": {"num_experts": 8, "top_k": 2, "every": 2, "layers": None}}
CHANCE = {"biography_en": 0.25, "biography_zh": 0.25, "arithmetic_en": 0.0, "story_en": 0.5}


def write_run(run_dir: Path) -> Path:
    """A run directory as `fit` leaves it: 600 steps, two transitions, three evaluations, experts in two layers."""
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.csv").write_bytes(MetricsTable(*_metric_rows()).to_bytes())
    for record in _transitions():
        append_jsonl(run_dir / "transitions.jsonl", record)
    for record in _expert_load():
        append_jsonl(run_dir / "expert_load.jsonl", record)
    for step in (199, 399, 599):
        path = run_dir / "eval" / f"step-{step:08d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(_evaluation(step)))
    (run_dir / "config.yaml").write_text(
        "# 中文\ndata:\n  class_path: datamodules.synthetic_world.SyntheticWorld\n  init_args:\n    name: 世界\n",
        "utf-8",
    )
    for step in (300, 600):
        manifest = run_dir / "checkpoints" / f"step-{step:08d}" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"metadata": {"step": step, "versions": {"torch": f"2.13.{step}"}}}))
    return run_dir


def _metric_rows() -> tuple[list[str], dict[int, dict[str, str]]]:
    random = np.random.default_rng(0)
    rows: dict[int, dict[str, float]] = {}
    for step in range(9, STEPS, 2):
        loss = 2.2 + 4.5 * math.exp(-step / 130) + (0.25 * math.exp(-(step - 200) / 20) if step > 200 else 0)
        total, active = (3.1e6, 3.1e6) if step < GROW_AT else (6.4e6, 6.4e6) if step < UPCYCLE_AT else (11.8e6, 7.9e6)
        noise = random.normal(0, 0.06, 4)
        step_ms = (110 if step < 200 else 190 if step < 400 else 240) * (1 + abs(noise[3]))
        rows[step] = {
            "train/loss": loss + noise[0], "train/loss_en": loss - 0.2 + noise[1],
            "train/loss_zh": loss + 0.2 + noise[2], "train/grad_norm": 0.7 * math.exp(4 * noise[1]),
            "train/lr": 3e-3 * min(step / 60, 1) * (1 - 0.8 * step / STEPS),
            "perf/tokens_per_s": TOKENS_PER_STEP / step_ms * 1000, "perf/step_ms": step_ms, "perf/data_wait_ms": 4.0,
            "growth/params_total": total, "growth/params_active": active, "growth/stage": (step >= 200) + (step >= 400),
        }  # fmt: skip
        if step % 50 == 49:
            rows[step] |= {"data/tokens": (step + 1) * TOKENS_PER_STEP}
            rows[step] |= {"val/bpb_en": loss / 2.4 - 0.1, "val/bpb_zh": loss / 2.2, "val/loss": loss}
            rows[step] |= {f"eval/{task}": 0.5 for task in CHANCE} | {"eval/lambada_en": 37.5}
        if step >= UPCYCLE_AT:
            rows[step] |= {
                "moe/load_cv": 0.4 * math.exp((400 - step) / 90) + abs(noise[2]),
                "moe/max_over_ideal": 1.4 + noise[1],
            }
    names = sorted({name for row in rows.values() for name in row})
    return names, {step: {name: format_number(name, float(v)) for name, v in row.items()} for step, row in rows.items()}


def _transitions() -> Iterator[dict[str, Any]]:
    common = {"optimizer_state": "mapped", "seconds": 1.25}
    yield common | {
        "step": GROW_AT, "tokens": GROW_AT * TOKENS_PER_STEP, "kind": ["widen", "deepen"],
        "source": SMALL, "target": LARGE, "method": ["iso", "zero_block"],
        "loss_before": 3.1234, "loss_after": 3.1235, "exact": True, "stage": 1,
        "max_logit_drift": 2.4e-6, "params_total": 6_400_000, "params_active": 6_400_000,
    }  # fmt: skip
    yield common | {
        "step": UPCYCLE_AT, "tokens": UPCYCLE_AT * TOKENS_PER_STEP, "kind": "upcycle",
        "source": LARGE, "target": ROUTED, "method": "drop", "loss_before": 2.4, "loss_after": 2.51, "stage": 2,
        "max_logit_drift": 0.37, "params_total": 11_800_000, "params_active": 7_900_000,
    }  # fmt: skip


def _expert_load() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(1)
    for step in range(UPCYCLE_AT, STEPS, 10):
        sharp = 0.5 * math.exp((400 - step) / 90) + 0.05
        layers = {}
        for layer in ("1", "3"):
            shares = np.exp(sharp * np.linspace(-1, 1, 8)[:: 1 if layer == "1" else -1] * 2 + random.normal(0, 0.05, 8))
            layers[layer] = (shares / shares.sum()).tolist()
        yield {"step": step, "tokens": step * TOKENS_PER_STEP, "layers": layers}


def _evaluation(step: int) -> dict[str, Any]:
    gain = 1 - math.exp(-step / 250)
    results = {
        task: {"acc": chance + (0.9 - chance) * gain * (1 - 0.15 * i), "acc_stderr": 0.012, "chance": chance}
        for i, (task, chance) in enumerate(CHANCE.items())
    }
    results["story_en"]["acc_norm"] = 0.61
    results["story_en_cats"] = {"exact_match,strict": 0.4, "exact_match,loose": 0.9, "exact_match_stderr,strict": 0.03}
    results["lambada_en"] = {"perplexity": 37.5}
    record = {
        "step": step,
        "tokens": (step + 1) * TOKENS_PER_STEP,
        "suite": "synthetic",
        "results": results,
        "limit": 100,
    }
    facts = {"num_samples": dict.fromkeys(results, 128), "num_fewshot": dict.fromkeys(results, 5)}
    return record | facts | {"versions": {"lm_eval": "0.4.13", "story_en": 1.0}}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; collects tags, attributes, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.source = text
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        assert self.open.pop() == tag

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + "\n"

    @property
    def headings(self) -> list[str]:
        """Section titles."""
        return re.findall(r"<h2>(.*?)</h2>", self.source)


def assert_self_contained(page: Page) -> None:
    """No script, nothing that a browser would fetch, no id twice."""
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [v or "" for n, v in page.attributes if n in ("src", "href", "xlink:href", "srcset", "action", "data")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links), links
    assert not re.findall(r"url\((?!#)", page.source) and "@import" not in page.source
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    used = [link[1:] for link in links if link.startswith("#")] + re.findall(r"url\(#([^)]*)\)", page.source)
    assert set(used) <= set(ids)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Page:
    report(run_dir)
    return Page((run_dir / "report.html").read_text("utf-8"))


def render(run_dir: Path) -> Page:
    return Page(render_page(load_run(run_dir)))


def test_page_is_whole_and_needs_nothing_else(run_dir: Path, page: Page) -> None:
    assert_self_contained(page)
    assert "http" not in page.source.replace("http-equiv", "")
    assert page.headings == ["Transitions", "Learning", "Evaluation", "Expert load", "Speed and optimizer", "Details"]
    assert page.tags.count("svg") == 11  # loss, bits per byte, accuracy, parameters, 2 + 3 of experts, speed, optimizer
    assert not list(run_dir.glob(".*"))


def test_headline_numbers(page: Page) -> None:
    cards = dict(re.findall(r"<h3>(.*?)</h3><strong>(.*?)</strong>", page.source))
    last = 2.2 + 4.5 * math.exp(-599 / 130) + 0.25 * math.exp(-399 / 20)
    assert cards["Bits per byte, English"] == f"{last / 2.4 - 0.1:.3f}"
    assert cards["Bits per byte, Chinese"] == f"{last / 2.2:.3f}"
    assert cards["Parameters"] == "11.8M" and "from 3.1M, ×3.81" in page.text
    assert cards["Active per token"] == "7.9M" and "from 3.1M, ×2.55" in page.text
    assert cards["Tokens"] == "2.46M" and "in 600 steps" in page.text
    gain = 1 - math.exp(-599 / 250)
    expected = [c + (0.9 - c) * gain * (1 - 0.15 * i) for i, c in enumerate(CHANCE.values())]
    assert cards["Mean accuracy"] == f"{100 * np.mean(expected):.1f} %"
    assert "chance 25.0 %, 4 of 4 tasks above" in page.text
    assert cards["Time in steps"].startswith("1 min")


def test_transition_table(page: Page) -> None:
    for words_on_page in ("widen + deepen", "iso + zero_block", "96x2 → 144x4", "3.1234 → 3.1235", "2.4e-06", "819k"):
        assert words_on_page in page.text
    assert "144x4 → 144x4, 8 experts top-2 in 2 layers" in page.text
    assert "11.8M parameters, 7.9M active" in page.text and "mapped" in page.text


def test_each_plot_over_the_run_marks_both_transitions(page: Page) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page.source, flags=re.DOTALL)
    pictures = [picture for picture in pictures if 'aria-label="Load of every expert at the end' not in picture]
    for picture in pictures:
        assert ">upcycle</text>" in picture
    assert sum(">widen + deepen</text>" in picture for picture in pictures) == 8  # heat maps begin at the upcycle
    assert ">English</text>" in pictures[0] and ">chance</text>" in pictures[2]
    assert "var(--c0)" in pictures[0] and "#2563b8" not in pictures[0]


def test_evaluation_table_has_the_last_values_and_chance(page: Page) -> None:
    row = re.search(r"<tr><td class=l>biography_zh</td>.*?</tr>", page.source)
    assert row is not None
    value = 0.25 + 0.65 * (1 - math.exp(-599 / 250)) * 0.85
    assert (
        f"<b>{100 * value:.1f} %</b>" in row[0]
        and "<td>25.0 %</td>" in row[0]
        and f"{100 * (value - 0.25):+.1f}" in row[0]
    )
    assert "<td>1.2 %</td>" in row[0] and "<td>128</td>" in row[0] and "<td>5</td>" in row[0]
    assert "suite synthetic, limit 100, lm_eval 0.4.13, first: step 199" in page.text


def test_what_was_not_asked_for_is_folded(page: Page) -> None:
    shown, folded = page.source.split("Parts of these tasks, and other metrics")
    assert "story_en_cats" not in shown and "lambada_en" not in shown
    assert re.search(
        r"story_en_cats</td><td class=l>exact_match,strict</td>.*?<b>40.0 %</b></td><td>3.0 %</td>", folded
    )
    assert re.search(r"lambada_en</td><td class=l>perplexity</td>.*?<td>37.5</td>", folded)
    assert "acc_norm" in folded and "stderr</td>" not in folded and "exact_match,loose" in folded


def test_the_old_network_at_a_transition_is_a_point_of_its_own(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    path = run_dir / "eval" / "step-00000399.json"
    after = _evaluation(399)
    after["results"]["biography_en"]["acc"] = 0.125
    path.write_text(json.dumps(after | {"transition": "x", "before_transition": _evaluation(399)}))
    values = load_run(run_dir).accuracies["biography_en"].y
    assert (
        len(values) == 4 and values[2] == 0.125 and values[1] == pytest.approx(0.25 + 0.65 * (1 - math.exp(-399 / 250)))
    )


def test_accuracies_without_evaluation_files_come_from_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,eval/arc,eval/ppl\n5,0.25,31\n9,0.5,30\n")
    data = load_run(tmp_path)
    assert list(data.accuracies) == ["arc"] and list(data.accuracies["arc"].y) == [0.25, 0.5]
    assert "chance levels not recorded" in render(tmp_path).text


def test_synthetic_data_is_named_and_chinese_survives(run_dir: Path, page: Page, tmp_path: Path) -> None:
    assert "SYNTHETIC" in page.text and "中文" in page.text and "世界" in page.text
    real = write_run(tmp_path / "真实")
    (real / "config.yaml").write_text("data: {class_path: datamodules.Bilingual, note: SyntheticWorld}\n")
    text = render(real).text
    assert "SYNTHETIC" not in text and "真实" in text
    (real / "config.yaml").unlink()
    manifest = real / "checkpoints" / "step-00000600" / "manifest.json"
    manifest.write_text(json.dumps({"metadata": {"data": {"class": "SyntheticWorld"}}}))
    assert "SYNTHETIC" in render(real).text


def test_versions_come_from_the_newest_checkpoint(run_dir: Path, page: Page) -> None:
    assert "2.13.600" in page.text and "2.13.300" not in page.text
    assert load_run(run_dir).versions == {"torch": "2.13.600"}


def test_absent_sections_are_left_out(tmp_path: Path) -> None:
    run_dir = tmp_path / "bare"
    run_dir.mkdir()
    (run_dir / "metrics.csv").write_text("step,train/loss\n9,3.5\n19,3.25\n")
    page = render(run_dir)
    assert_self_contained(page)
    assert page.headings == ["Learning", "Details"] and page.tags.count("svg") == 1
    assert ">steps</text>" in page.source  # no tokens were logged
    assert "19 steps, no transition" in page.text and "SYNTHETIC" not in page.text


@pytest.mark.parametrize(
    "text", ["", "step", "step\n", "step,train/loss\n", "step,train/loss\n9,nan\n", "step,a\n5,inf\n7,1"]
)
def test_a_run_that_has_hardly_begun(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    assert render(tmp_path).headings in ([], ["Details"])
    with pytest.raises(InputError, match="to draw yet"):
        report(tmp_path, picture=tmp_path / "a.png")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", ["transitions.jsonl", "expert_load.jsonl", "config.yaml", "eval", "checkpoints"])
def test_any_part_may_be_missing(tmp_path: Path, missing: str) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / missing).rename(tmp_path / "gone")
    assert_self_contained(render(run_dir))


def test_broken_side_files_do_not_stop_the_report(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "config.yaml").write_text("data: [unclosed\n")
    (run_dir / "eval" / "step-00000599.json").write_text('{"step": 599, "results"')
    (run_dir / "checkpoints" / "step-00000600" / "manifest.json").write_bytes(b"\xff\xfe")
    with (run_dir / "transitions.jsonl").open("a") as file:
        file.write('{"step": 500, "kind": "wid')
    page = render(run_dir)
    assert "2 transitions" in page.text and "step 399" in page.text and "2.13.300" in page.text


def test_strings_from_a_run_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    evil = "</details></svg><script>alert(1)</script><img src=http://x.example onerror=a> $\\frac$ 中\x07&amp;"
    run_dir = write_run(tmp_path / "<b>run&")
    metrics = MetricsTable(*_metric_rows())
    code = "x</style><script>"
    added = {f"val/bpb_{code}": "1.5", f"eval/{evil}": "0.5", r"eval/$\frac{$": "0.5"}  # not even as mathematics
    metrics.names = sorted([*metrics.names, *added])
    for step in (99, 199):
        metrics.rows[step] |= added
    (run_dir / "metrics.csv").write_bytes(metrics.to_bytes())
    record = {"step": 500, "tokens": 2_048_000, "kind": [evil], "method": {evil: evil}, "source": evil, "stage": 3}
    append_jsonl(
        run_dir / "transitions.jsonl", record | {"target": {"dim": evil, "moe": {"top_k": evil}}, "seconds": evil}
    )
    result = {
        "step": 700,
        "suite": evil,
        "limit": evil,
        "versions": {evil: evil},
        "results": {evil: {"acc": 0.5, evil: 1}},
    }
    (run_dir / "eval" / "step-00000700.json").write_text(json.dumps(result))
    append_jsonl(run_dir / "expert_load.jsonl", {"step": 610, "tokens": 2_500_000, "layers": {evil: [0.5, 0.5]}})
    (run_dir / "config.yaml").write_text(f"a: {evil}", "utf-8")
    manifest = run_dir / "checkpoints" / "step-00000600" / "manifest.json"
    manifest.write_text(json.dumps({"metadata": {"versions": {evil: evil}}}))
    page = render(run_dir)
    assert_self_contained(page)
    assert page.text.count("<script>alert(1)</script>") >= 10


def test_only_run_directories_are_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.csv"):
        report(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        report(tmp_path / "nowhere")
    (tmp_path / "metrics.csv").write_text("name,age\nA,3\n")
    with pytest.raises(InputError, match="column step first"):
        report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_output_and_picture(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "overview.png"
    for _ in range(2):  # a report may replace a report
        report(run_dir, output=page, picture=picture)
        assert capsys.readouterr().out == f"{page}\n{picture}\n"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and Page(page.read_text("utf-8")).headings
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("output", "mine.html", "is not a growmoe report"),
        ("output", "page.txt", "does not end in .html"),
        ("output", "none/page.html", "does not exist"),
        ("output", "folder.html", "is a folder"),
        ("picture", "mine.png", "is not a growmoe report"),
        ("picture", "page.html", "does not end in .png"),
    ],
)
def test_files_of_others_are_left_alone(run_dir: Path, tmp_path: Path, option: str, name: str, message: str) -> None:
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    (tmp_path / "mine.png").write_bytes(b"mine")
    (tmp_path / "folder.html").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        report(run_dir, **{option: tmp_path / name})
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>" and (tmp_path / "mine.png").read_bytes() == b"mine"


def test_a_failed_write_leaves_the_old_page(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.html"
    report(run_dir, output=page)
    old = page.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        report(run_dir, output=page)
    assert page.read_bytes() == old and list(tmp_path.iterdir()) == [page]


def test_same_logs_give_the_same_page(run_dir: Path, page: Page) -> None:
    assert render(run_dir).source == page.source


def test_figures_leave_no_trace_in_matplotlib() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with drawing_style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_token_axis_between_and_beyond_logged_steps(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,data/tokens,x\n0,,1\n10,1000,\n20,2000,\n25,,1\n40,6000,\n50,,1\n")
    data = load_run(tmp_path)
    np.testing.assert_allclose(data.x_at([0, 10, 15, 30, 50]), [0, 1000, 1500, 4000, 8000])
    np.testing.assert_allclose(data.series("x").x, [0, 3000, 8000])
    assert data.x_of({"step": 15, "tokens": 1234}) == 1234 and data.x_of({"step": 15}) == 1500


@given(
    noise=st.lists(st.floats(-5, 5), min_size=1, max_size=80),
    slope=st.floats(-3, 3),
    borders=st.lists(st.floats(0, 80), max_size=3),
)
def test_smoothing_keeps_straight_lines_and_ranges(noise: list[float], slope: float, borders: list[float]) -> None:
    x = np.arange(len(noise), dtype=float)
    straight = smooth(Series(x, 7 + slope * x), borders)
    np.testing.assert_allclose(straight.y, 7 + slope * x, atol=1e-6)
    np.testing.assert_array_equal(straight.x, x)
    assert np.isfinite(smooth(Series(x, np.array(noise)), borders).y).all()


def test_smoothing_keeps_jumps_at_transitions_and_thins_long_runs() -> None:
    x = np.arange(200, dtype=float)
    y = np.where(x < 100, 1.0, 2.0)
    np.testing.assert_allclose(
        smooth(Series(x, y), [99.0]).y, y
    )  # the loss at a transition's step is the old network's
    assert abs(smooth(Series(x, y), []).y[100] - y[100]) > 0.1
    assert len(smooth(Series(np.arange(50_000.0), np.ones(50_000)), []).x) <= MAX_POINTS


def test_smoothing_calms_noise_from_the_start_of_a_later_stage_on() -> None:
    noise = np.random.default_rng(0).normal(size=1000)
    calm = smooth(Series(np.arange(1000.0), noise), [500.0]).y
    assert calm[501:515].std() < 0.5 * noise[501:515].std()


def test_labels_of_near_transitions_do_not_overlap() -> None:
    assert _label_rows([0.1, 0.5, 0.9], ["widen", "deepen", "upcycle"]) == [0, 0, 0]
    assert _label_rows([0.10, 0.11, 0.12, 0.6], ["widen + deepen"] * 4) == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1k"),
        (4096, "4.1k"),
        (819_200, "819k"),
        (999_900, "1M"),
        (1.234e9, "1.23B"),
        (None, "–"),
    ],
)
def test_counts_in_words(value: float | None, text: str) -> None:
    assert words.short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.25, "1.2 s"),
        (59.97, "1 min 00 s"),
        (200, "3 min 20 s"),
        (14_700, "4 h 05 min"),
        (183_600, "2 d 3 h"),
        ("x", "–"),
    ],
)
def test_durations_in_words(seconds: Any, text: str) -> None:
    assert words.duration(seconds) == text


def test_architectures_in_words() -> None:
    assert words.architecture_change(SMALL, LARGE) == "96x2 → 144x4"
    assert words.architecture({**ROUTED, "moe": {"num_experts": 4, "top_k": 1, "layers": [3]}}) == (
        "144x4, 4 experts top-1 in 1 layer"
    )
    assert words.architecture_change(SMALL, {**SMALL, "num_heads": 6}) == "96x2, num_heads 3 → 96x2, num_heads 6"
    assert words.architecture_change(None, "7B") == "– → 7B"


def test_figure_text_is_ascii() -> None:
    assert plain("故事_zh $x$") == "??_zh $x$" and len(plain("a" * 90)) == 30
