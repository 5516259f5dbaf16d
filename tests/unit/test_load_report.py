"""Expert load in the report: what the log is read as, what is said of it, and how it is drawn."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from app.report import heatmaps, plots
from app.report.data import load_run
from app.report.drawing import drawing_style
from app.report.load import FINAL_STEPS, MAX_COLUMNS, LoadLog, read_load
from app.report.theme import DEAD_COLOR, LOAD_COLORS
from app.wandb_log import LOAD_PICTURE, Mirror
from modules.jsonl import append_jsonl
from tests.unit.test_report import Page, assert_self_contained, render

EVEN, SKEWED, DEAD = [0.25] * 4, [0.4, 0.3, 0.2, 0.1], [0.5, 0.25, 0.25, 0.0]


def write_load(run_dir: Path, records: list[tuple[int, Any]], grown_at: tuple[int, ...] = ()) -> Path:
    """A run directory with these loads by layer at these steps, 10 tokens per step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{step},{10 * step}\n" for step, _ in records)
    (run_dir / "metrics.csv").write_text(f"step,data/tokens\n{rows}")
    lines = (json.dumps({"step": step, "tokens": 10 * step, "layers": layers}) + "\n" for step, layers in records)
    (run_dir / "expert_load.jsonl").write_text("".join(lines))
    for stage, step in enumerate(grown_at, start=1):
        append_jsonl(run_dir / "transitions.jsonl", {"step": step, "tokens": 10 * step, "kind": "x", "stage": stage})
    return run_dir


def read(*arguments: Any) -> LoadLog:
    return read_load(load_run(write_load(*arguments)))


def test_the_final_load_is_the_mean_of_the_last_logged_steps(tmp_path: Path) -> None:
    turning = [(step, {"1": SKEWED if step % 2 else SKEWED[::-1], "3": DEAD}) for step in range(1, 2 * FINAL_STEPS + 1)]
    final = read(tmp_path, turning).final()
    assert final is not None and final.layers == ("1", "3")
    np.testing.assert_allclose(final.ratios_NE, [[1, 1, 1, 1], [2, 1, 1, 0]])
    assert (final.first_step, final.last_step, final.num_steps) == (FINAL_STEPS + 1, 2 * FINAL_STEPS, FINAL_STEPS)
    np.testing.assert_allclose(final.cv_N, [0, 0.5**0.5])
    assert (list(final.peak_N), list(final.least_N)) == ([1, 2], [1, 0])
    assert final.dead("3") == [3] and final.dead("1") == [] and final.dead("7") == []


def test_what_was_before_the_last_transition_is_not_of_the_final_network(tmp_path: Path) -> None:
    records = [(10, {"1": DEAD}), (20, {"1": DEAD}), (30, {"1": EVEN}), (40, {"1": EVEN})]
    final = read(tmp_path / "same", records, (20,)).final()  # the step of the transition is still the old network's
    assert final is not None and final.num_steps == 2 and not final.dead("1")
    wider = [*records, (50, {"1": [0.5, 0.5], "2": [0.5, 0.5]})]
    final = read(tmp_path / "other", wider).final()
    assert final is not None and final.num_steps == 1 and final.ratios_NE.tolist() == [[1, 1], [1, 1]]


def test_it_is_said_in_words(tmp_path: Path) -> None:
    def said(*records: tuple[int, Any]) -> str:
        final = read(tmp_path, list(records)).final()
        assert final is not None
        return final.summary()

    assert said((5, {"2": SKEWED})) == (
        "Step 5: coefficient of variation 0.45. Busiest: expert 0 of layer 2, 1.60 times an even share. Every expert "
        "has tokens."
    )
    assert said((5, {"2": SKEWED, "4": DEAD}), (9, {"2": SKEWED, "4": DEAD})) == (
        "Mean of the 2 logged steps 5 to 9: coefficient of variation 0.58 (mean of 2 layers; most in layer 4: 0.71). "
        "Busiest: expert 0 of layer 4, 2.00 times an even share. 1 of 8 experts is without a token, in layer 4: "
        "expert 3."
    )
    many = [1.0] + [0.0] * 15
    assert said((5, {"0": many, "1": DEAD})).endswith(
        "16 of 20 experts are without a token, in 2 layers, most in layer 0: experts 1, 2, 3, 4, 5, 6, 7, 8 and 7 more."
    )


def test_load_over_time_has_holes_where_there_was_nothing(tmp_path: Path) -> None:
    """Layer 1 is not routed for a while, and comes back with more experts."""
    records = [(10, {"0": EVEN}), (20, {"0": EVEN, "1": [0.75, 0.25]}), (30, {"0": EVEN}), (40, {"1": EVEN})]
    log = read(tmp_path, records)
    assert log.layers == ["0", "1"]
    load = log.over_time("1")
    assert load.edges.tolist() == [150, 250, 350, 450]
    nan = np.nan
    np.testing.assert_array_equal(load.ratios_EW, [[1.5, nan, 1], [0.5, nan, 1], [nan, nan, 1], [nan, nan, 1]])
    with drawing_style():
        figure = heatmaps.map_over_time(load_run(tmp_path), load, [])
    pixels = figure.axes[0].images[0].get_array()
    assert pixels is not None and np.ma.getmaskarray(pixels)[:, [0, 250, 600]].any(axis=0).tolist() == [
        True,
        True,
        False,
    ]


def test_neighbours_share_a_column_in_a_long_run(tmp_path: Path) -> None:
    rows = [(step, {"0": [0.5, 0.5] if step % 2 else [1.0, 0.0]}) for step in range(4 * MAX_COLUMNS)]
    load = read(tmp_path, rows).over_time("0")
    assert load.ratios_EW.shape == (2, MAX_COLUMNS) and (load.edges[0], load.edges[-1]) == (-5, 40 * MAX_COLUMNS - 5)
    np.testing.assert_allclose(load.ratios_EW[:, 5], [1.5, 0.5])


def test_layers_order_by_number_and_the_uneven_ones_are_shown(tmp_path: Path) -> None:
    layers = {str(n): EVEN for n in range(48)} | {"10": DEAD, "31": SKEWED}
    log = read(tmp_path, [(10, layers)])
    final = log.final()
    assert log.layers == [str(n) for n in range(48)] and final is not None
    shown = final.telling_layers(8)
    assert len(shown) == 8 and {"0", "10", "31"} <= set(shown) and shown == sorted(shown, key=int)
    assert final.telling_layers(99) == log.layers


@pytest.mark.parametrize(
    "layers", [None, [], "x", {}, {"1": []}, {"1": "even"}, {"1": [0.5, None]}, {"1": [-1, 2]}, {"1": [[1], [2]]}]
)
def test_records_without_shares_are_passed_over(tmp_path: Path, layers: Any) -> None:
    log = read(tmp_path, [(10, layers), (20, {"1": EVEN})])
    final = log.final()
    assert final is not None and log.steps_S == [20] and final.num_steps == 1
    alone = write_load(tmp_path / "alone", [(10, layers)])
    assert read_load(load_run(alone)).final() is None
    assert "Expert load" not in render(alone).headings


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 1), (1, 3), (2, 8), (48, 64), (3, 256)])
def test_networks_of_any_size_are_drawn(tmp_path: Path, num_layers: int, num_experts: int) -> None:
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(num_experts), size=(3, num_layers))
    shares[:, num_layers - 1, 1:] = 0  # one expert takes all
    records = [
        (10 * (s + 1), {str(n): row.tolist() for n, row in enumerate(layers)}) for s, layers in enumerate(shares)
    ]
    page = render(write_load(tmp_path, records))
    assert_self_contained(page)
    assert page.tags.count("svg") == 1 + min(num_layers, 8)
    table = page.source.split("Load by layer at the end, in numbers")[1]
    assert len(re.findall(r"<tr><td class=l>\d+</td>", table)) == num_layers
    if num_experts > 1:
        assert f"{num_experts - 1} of {num_layers * num_experts} experts" in page.text
    assert ("Over the run: 8 of 48 layers" in page.text) == (num_layers > 8)


def test_a_reader_without_eyes_gets_the_figures(tmp_path: Path) -> None:
    page = render(write_load(tmp_path, [(10, {"1": SKEWED, "3": DEAD})]))
    labels = [value or "" for name, value in page.attributes if name == "aria-label"]
    assert "1 of 8 experts is without a token, in layer 3: expert 3." in labels[0]
    assert "at the end: variation 0.45, busiest 1.60, every expert has tokens" in labels[1]
    assert "at the end: variation 0.71, busiest 2.00, no token: expert 3" in labels[2]
    row = re.search(r"<tr><td class=l>3</td>.*?</tr>", page.source)
    assert row is not None and re.findall(r"<td.*?>(.*?)</td>", row[0]) == [
        "3", "4", "0.707", "2.000", "0.000", "0", "1", "expert 3",
    ]  # fmt: skip


def test_colours_stand_for_load(tmp_path: Path) -> None:
    final = read(tmp_path, [(10, {"0": [0.25, 0.25, 0.5, 0.0], "1": [0.05, 0.05, 0.2, 0.7]})]).final()
    assert final is not None
    with drawing_style():
        figure = heatmaps.final_map(final)
    image = figure.axes[0].images[0]
    pixels = image.to_rgba(image.get_array())[..., :3]
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 4
    cells = pixels[height // 2 :: height, width // 2 :: width]
    np.testing.assert_allclose(cells[0, 3], to_rgb(DEAD_COLOR), atol=1e-6)
    np.testing.assert_allclose(cells[0, 0], to_rgb(LOAD_COLORS[4]), atol=0.01)
    np.testing.assert_allclose(cells[0, 2], to_rgb(LOAD_COLORS[6]), atol=0.01)  # twice: half-way to four times
    np.testing.assert_allclose(cells[1, 0], to_rgb(LOAD_COLORS[0]), atol=0.01)  # a fifth is shown as a quarter
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == ["1/4", "1/2", "1 = even", "2", "4"]
    crosses = figure.axes[0].lines[0]
    assert (list(crosses.get_xdata()), list(crosses.get_ydata())) == ([3], [0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.0", "1.0", "2.0", "0.2", "0.2", "0.8", "2.8"]


def test_colours_darken_evenly_to_both_sides() -> None:
    """OKLab lightness (B. Ottosson, 2020)."""
    linear = np.array([to_rgb(color) for color in LOAD_COLORS])
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]).T
    lightness = np.cbrt(cones) @ np.array([0.2105, 0.7936, -0.0041])
    np.testing.assert_allclose(np.diff(lightness), [0.144] * 4 + [-0.144] * 4, atol=0.01)


def test_routers_and_dropped_choices_are_drawn_when_logged(tmp_path: Path) -> None:
    names = ["moe/dropped_first", "moe/dropped_second", "moe/entropy", "moe/logit_rms"]
    (tmp_path / "metrics.csv").write_text(f"step,{','.join(names)}\n10,0.1,0.2,2.0,1\n20,0.1,0.2,1.5,2\n")
    page = render(tmp_path)
    assert page.tags.count("svg") == 2 and "Routers" in page.text and "Dropped choices" in page.text
    assert ">second</text>" in page.source
    (tmp_path / "metrics.csv").write_text("step,train/lr\n10,0.1\n")
    assert plots.dropped(load_run(tmp_path)) is None and plots.router(load_run(tmp_path)) is None


class Recorder(Mirror):
    """Keeps what it would send to W&B."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(None, run_dir)
        self.sent: list[tuple[str, Any, int | None, Any]] = []

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.sent.append((key, images, step, kwargs["caption"]))


def test_wandb_gets_the_picture_at_the_end(tmp_path: Path) -> None:
    mirror = Recorder(write_load(tmp_path / "run", [(10, {"1": SKEWED})]))
    mirror.finalize("failed")
    assert not mirror.sent
    mirror.finalize("success")
    ((key, (image,), step, (caption,)),) = mirror.sent
    assert (key, step) == (LOAD_PICTURE, 10) and image.size[0] > 500 and "Every expert has tokens" in caption


def test_wandb_gets_nothing_of_a_dense_run_and_a_warning_of_a_broken_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss\n10,3\n")
    dense = Recorder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense.finalize("success")
    assert not dense.sent
    with pytest.warns(UserWarning, match="picture of the experts' load was not logged"):
        Recorder(tmp_path / "missing").finalize("success")


def test_page_reads_the_same_twice(tmp_path: Path) -> None:
    run_dir = write_load(tmp_path, [(10, {"1": SKEWED}), (20, {"1": DEAD})])
    first: Page = render(run_dir)
    assert render(run_dir).source == first.source
