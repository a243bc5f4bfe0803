"""Figures: what they draw, and that the user's matplotlib is left alone."""

import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest
import torch
from PIL import Image

from at_extensions.publishing import figures, plots


def lines_of(axes):
    return {tuple(line.get_ydata()) for line in axes.lines if len(line.get_xdata())}


def test_curves_draw_what_was_measured(make_run):
    run = make_run(epochs=3)
    figure = plots.training_curves({"a": run.metrics(), "b": [{"epoch": 1, "train_loss": 4.0, "train_accuracy": None}]})
    accuracy, loss = figure.axes
    assert lines_of(accuracy) == {tuple(row[k] for row in run.metrics()) for k in
                                  ("train_accuracy", "val_clean_accuracy", "val_robust_accuracy")}  # fmt: skip
    assert lines_of(loss) == {(2.0, 1.0, 2 / 3), (4.0,)}


def test_bars_are_as_long_as_the_accuracies(make_run):
    reports = {"a": make_run.evaluation(0.9, 0.5), "b": make_run.evaluation(0.8, 0.25, interval=None)}
    (axes,) = plots.accuracy_bars(reports).axes
    assert sorted(bar.get_width() for bar in axes.patches) == [0.25, 0.5, 0.8, 0.9]
    ends = [segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert ends == [pytest.approx([0.4, 0.6])]


def test_attacks_keep_their_order_and_runs_their_own(make_run):
    reports = {
        "a": make_run.evaluation(after_attack={"apgd-ce": 0.7, "square": 0.5}),
        "b": make_run.evaluation(after_attack={"apgd-ce": 0.6, "fab-t": 0.4}),
    }
    (axes,) = plots.after_attack(reports).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["clean", "after apgd-ce", "after square", "after fab-t"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1, 2], [0, 1, 3]]


def test_classes_show_counts_where_they_differ():
    rows = [{"class": i, "count": 100 // (i + 1), "clean": 0.5, "robust": None} for i in range(3)]
    even = [row | {"count": 10} for row in rows]
    figure = plots.per_class_bars({"tail": {"per_class": rows}, "even": {"per_class": even}}, ["cat", "dog", "$x$"])
    labels = [[t.get_text() for t in axes.get_xticklabels()] for axes in figure.axes]
    assert labels == [["cat\nn=100", "dog\nn=50", "$x$\nn=33"], ["cat", "dog", "$x$"]]


def test_training_counts_win_over_test_counts():
    rows = [{"class": i, "count": 10, "train_count": 500 // (i + 1), "clean": 1.0, "robust": 1.0} for i in range(2)]
    (axes,) = plots.per_class_bars({"tail": {"per_class": rows}}).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0\nn=500", "1\nn=250"]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_triples_show_the_pixels_and_predictions(make_run, channels):
    examples = make_run.examples(3, channels)
    figure = plots.triples(examples, class_names=["cat", "dog"])
    grid = [axes for axes in figure.axes if axes.images]
    assert len(grid) == 9
    shown = torch.from_numpy(grid[0].images[0].get_array().data.copy()).permute(2, 0, 1)
    torch.testing.assert_close(shown, examples["images"][0][:3].expand(3, -1, -1), atol=2e-7, rtol=0)
    assert [axes.get_xlabel() for axes in grid] == ["✓ says cat", "✓ says dog", "✓ says cat", "", "", "",
                                                    "✗ says dog", "✗ says cat", "✗ says dog"]  # fmt: skip
    assert grid[3].get_ylabel() == "perturbation\n× 2.5"


@pytest.mark.parametrize(("largest", "gain"), [(0.2, 2.5), (8 / 255, 15), (1.0, 0.5), (0.0, 1.0), (0.001, 500)])
def test_gain_spans_the_grey_scale_without_clipping(largest, gain):
    perturbation = torch.tensor([[-largest, largest / 2]])
    assert plots.gain_of(perturbation) == pytest.approx(gain)
    assert (0.5 + plots.gain_of(perturbation) * perturbation).min() >= -1e-6


def every_figure(make_run):
    reports = {"--><b>$a": make_run.evaluation(), "b": make_run.evaluation()}
    return [
        plots.training_curves({"--><b>$a": make_run().metrics()}),
        plots.accuracy_bars(reports),
        plots.after_attack(reports),
        plots.per_class_bars(reports, ["--><b>", "$"]),
        plots.triples(make_run.examples(), class_names=["--><b>", "$"]),
    ]


def test_svg_is_well_formed_self_contained_and_has_its_own_ids(make_run):
    for i, figure in enumerate(every_figure(make_run)):
        text = figures.to_svg(figure, f"f{i}", 'say "<hi>"')
        root = ET.fromstring(text.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert "http" not in text
        assert "<!--" not in text
        assert root.get("aria-label") == 'say "<hi>"'
        assert root.get("viewBox")
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert ids
        assert all(name.startswith(f"f{i}-") for name in ids)
        assert set(re.findall(r'(?:url\(|href=")#([^")]*)', text)) <= set(ids)
        assert "currentColor" in text


def test_the_same_figure_gives_the_same_text(make_run):
    texts = [figures.to_svg(plots.accuracy_bars({"a": make_run.evaluation()}), "f", "") for _ in range(2)]
    assert texts[0] == texts[1]


def test_png_is_an_image():
    data = figures.to_png(plots.accuracy_bars({"a": {"clean_accuracy": 1.0, "robust_accuracy": 0.5}}), dpi=50)
    image = Image.open(io.BytesIO(base64.b64decode(data.removeprefix("data:image/png;base64,"))))
    assert image.size == (480, 82)
    assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_users_style_is_neither_read_nor_changed(make_run):
    plain = figures.to_svg(plots.accuracy_bars({"a": make_run.evaluation()}), "f", "")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "none"}):
        before = dict(mpl.rcParams)
        assert figures.to_svg(plots.accuracy_bars({"a": make_run.evaluation()}), "f", "") == plain
        with pytest.raises(KeyError):
            plots.accuracy_bars({"a": {}})
        assert dict(mpl.rcParams) == before


def test_no_pyplot_and_no_backend_is_loaded():
    code = (
        "import sys; from at_extensions.publishing import figures, plots\n"
        "figures.to_svg(plots.accuracy_bars({'a': {'clean_accuracy': 1.0, 'robust_accuracy': 0.5}}), 'f', '')\n"
        "import matplotlib; print('matplotlib.pyplot' in sys.modules, matplotlib.get_backend(auto_select=False))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "None"]


def test_many_classes_stand_in_the_order_of_their_frequency_with_their_counts():
    counts = [(7 * i) % 100 + 1 for i in range(100)]
    rows = [
        {"class": i, "count": 10, "clean": c / 100, "robust": c / 200, "train_count": c} for i, c in enumerate(counts)
    ]
    axes, beside = plots.per_class_bars({"a": {"per_class": rows}}).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert heights[:100] == sorted((c / 100 for c in counts), reverse=True)
    assert heights[100:] == sorted((c / 200 for c in counts), reverse=True)
    assert beside.lines[0].get_ydata().tolist() == sorted(counts, reverse=True)
