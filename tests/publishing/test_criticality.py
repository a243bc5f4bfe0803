"""Layer criticality written as JSON, CSV and pictures, and what the pictures show."""

import csv
import json
import math

import matplotlib as mpl
import numpy as np
import pytest
import scipy.stats

from at_extensions.analysis import LayerCriticality
from at_extensions.publishing import criticality_plots as plots
from at_extensions.publishing.criticality import read_criticality, write_criticality

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc")


def result(seed=0, wrapper="network.", trials=3, layers=LAYERS, **options):
    draw = np.random.default_rng(seed)
    values = {wrapper + name: (0.2 + 0.6 * draw.random(trials)).tolist() for name in layers}
    return LayerCriticality(values, wrapper=wrapper, **options)


def test_what_was_written_reads_back(tmp_path):
    results = {"A": result(0), "B": result(1, ci_width=0.1), "one trial": result(2, trials=1)}
    write_criticality(results, tmp_path)
    assert {n: r.to_dict() for n, r in read_criticality(tmp_path).items()} == {
        n: r.to_dict() for n, r in results.items()
    }
    with (tmp_path / "criticality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert (rows[6]["model"], rows[6]["layer"]) == ("B", "network.layer1.0.conv1")
    assert float(rows[6]["criticality"]) == results["B"].mean["network.layer1.0.conv1"]
    assert rows[-1]["std"] == ""


def test_files_that_hold_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results"):
        read_criticality(tmp_path)
    for text in ("{", "[]", '{"A": {}}', '{"A": 1}'):
        (tmp_path / "criticality.json").write_text(text)
        with pytest.raises(ValueError, match="does not hold results"):
            read_criticality(tmp_path)


def lines(figure):
    return [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]


def test_depth_curves_show_means_and_intervals():
    results = {"A": result(0), "B": result(1, wrapper="module.")}
    figure = plots.depth_curves(results)
    for line, found in zip(lines(figure), results.values()):
        assert list(line.get_xdata()) == list(range(5))
        assert list(line.get_ydata()) == list(found.mean.values())
    bands = [c for c in figure.axes[0].collections if c.get_paths()]
    heights = bands[0].get_paths()[0].vertices[:, 1]
    ends = [end for interval in results["A"].interval.values() for end in interval]
    assert set(ends) <= set(heights)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["conv1", "layer1", "layer2", "fc"]


def test_other_architectures_stand_at_relative_depth():
    figure = plots.depth_curves({"A": result(0), "B": result(1, layers=LAYERS[:3])})
    assert [list(line.get_xdata()) for line in lines(figure)] == [[0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1]]


def test_heat_map_has_a_row_a_model_and_a_column_a_layer():
    results = {"A": result(0), "B": result(1, wrapper="", layers=("conv1", "fc", "extra"))}
    shown = plots.heat_map(results).axes[0].images[0].get_array()
    assert shown.shape == (2, 6)
    np.testing.assert_array_equal(shown[0, :5], list(results["A"].mean.values()))
    assert list(shown.mask[1]) == [False, True, True, True, False, False]
    assert shown[1, 4] == results["B"].mean["fc"]


def test_differences_carry_welchs_intervals():
    a, b = result(0, trials=3), result(1, trials=6, wrapper="")
    for short, (mean, low, high) in b.minus(a).items():
        test = scipy.stats.ttest_ind(b.values[short], a.values[f"network.{short}"], equal_var=False)
        assert mean == pytest.approx(np.mean(b.values[short]) - np.mean(a.values[f"network.{short}"]))
        assert (low, high) == pytest.approx(tuple(test.confidence_interval()))
    bars = plots.difference_bars(a, b, ("A", "B")).axes[0].patches
    assert [bar.get_height() for bar in bars] == [mean for mean, _, _ in b.minus(a).values()]
    alone = result(0, trials=1)
    assert all(math.isnan(low) for _, low, _ in b.minus(alone).values())
    exact = LayerCriticality({"fc": [0.5]}, exact=True)
    assert exact.minus(LayerCriticality({"fc": [0.25]}, exact=True)) == {"fc": (0.25, 0.25, 0.25)}
    with pytest.raises(ValueError, match="no layer in common"):
        plots.difference_bars(a, result(layers=("other",)))


def test_stage_bars_show_stages_and_layers():
    found = result(0)
    axes = plots.stage_bars({"A": found}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(list(found.by_stage().values()))
    assert sorted(axes.lines[0].get_ydata()) == sorted(found.mean.values())


def test_eps_curves_are_in_the_order_of_eps():
    results = {"robust": result(0), "standard": result(1), "mild": result(2)}
    eps = {"robust": 8 / 255, "standard": 0, "mild": 2 / 255}
    curve = plots.eps_curves(results, eps).axes[0].lines[-1]
    assert list(curve.get_xdata()) == pytest.approx([0, 2, 8])
    assert list(curve.get_ydata()) == [results[n].average for n in ("standard", "mild", "robust")]
    with pytest.raises(ValueError, match="eps is missing for 'mild'"):
        plots.eps_curves(results, {"robust": 8 / 255, "standard": 0})


def test_results_that_cannot_be_drawn_together():
    with pytest.raises(ValueError, match="different divergences"):
        plots.heat_map({"A": result(0), "B": result(1, divergence="kl")})
    with pytest.raises(ValueError, match="no results"):
        plots.depth_curves({})


def test_the_users_style_is_neither_read_nor_changed(tmp_path):
    before = dict(mpl.rcParams)
    write_criticality({"A": result(0)}, tmp_path / "a")
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        write_criticality({"A": result(0)}, tmp_path / "b")
    assert dict(mpl.rcParams) == before
    for picture in (tmp_path / "a").glob("*.png"):
        assert picture.read_bytes() == (tmp_path / "b" / picture.name).read_bytes()


def test_json_is_strict(tmp_path):
    write_criticality({"A": result(0, trials=1, divergence="kl")}, tmp_path)
    json.loads((tmp_path / "criticality.json").read_text(), parse_constant=pytest.fail)
