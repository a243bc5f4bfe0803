"""Sweeps over lr / batch size: where a run stands in one, rank correlations, and their place in the report."""

import math

import numpy as np
import pytest
import scipy.stats

from at_extensions.publishing import sweep_plots, write_report
from at_extensions.publishing.sweeps import is_sweep, rank_correlations, sweep_point

PLAIN = {"optimizer": "sgd", "momentum": 0.0, "batch_size": 100}


@pytest.mark.parametrize(
    ("training", "series", "ratio", "effective"),
    [
        (PLAIN | {"lr": 0.3}, "plain sgd", 0.003, 0.003),
        (PLAIN | {"lr": 0.3, "momentum": 0.9}, "sgd, momentum 0.9", 0.003, 0.03),
        (PLAIN | {"lr": 0.3, "optimizer": "deat"}, "deat", 0.003, 0.003 / math.sqrt(5)),
    ],
)
def test_a_run_stands_at_its_nominal_and_effective_ratio(training, series, ratio, effective):
    point = sweep_point("a", training, 0.5, 0.6)
    assert (point.series, point.robust, point.robust_train) == (series, 0.5, 0.6)
    assert point.ratio == pytest.approx(ratio, rel=1e-12)
    assert point.effective_ratio == pytest.approx(effective, rel=1e-12)


@pytest.mark.parametrize("training", [PLAIN | {"lr": 0.1, "optimizer": "adamw"}, {"optimizer": "sgd"}, {}])
def test_what_has_no_such_ratio_is_no_point(training):
    assert sweep_point("a", training, 0.5) is None


def sweep(optimizer, rates, accuracies):
    return [sweep_point(f"{optimizer}{lr}", PLAIN | {"optimizer": optimizer, "lr": lr}, a)
            for lr, a in zip(rates, accuracies)]  # fmt: skip


def test_rank_correlations_are_spearmans():
    draw = np.random.default_rng(0)
    rates, accuracies = [0.01, 0.03, 0.1, 0.1, 0.3], draw.random(5).tolist()
    sgd, deat = sweep("sgd", rates, accuracies), sweep("deat", rates[:3], [0.1, 0.2, 0.3])
    first, second, together = rank_correlations(sgd + deat)
    assert (first.series, first.runs) == ("plain sgd", 5)
    assert first.nominal == pytest.approx(first.effective)
    ranks = [scipy.stats.rankdata(v) for v in (rates, accuracies)]
    assert first.nominal == pytest.approx(np.corrcoef(*ranks)[0, 1])  # Pearson's of the ranks, ties shared
    assert second.nominal == pytest.approx(1)
    assert (together.series, together.runs) == ("all runs", 8)
    nominal = scipy.stats.spearmanr([p.ratio for p in sgd + deat], [p.robust for p in sgd + deat]).statistic
    effective = scipy.stats.spearmanr([p.effective_ratio for p in sgd + deat], [p.robust for p in sgd + deat]).statistic
    assert (together.nominal, together.effective) == (pytest.approx(nominal), pytest.approx(effective))
    assert nominal != pytest.approx(effective)


def test_three_ratios_of_one_optimiser_make_a_sweep():
    assert is_sweep(sweep("sgd", [0.1, 0.2, 0.3], [0.5] * 3))
    assert not is_sweep(sweep("sgd", [0.1, 0.1, 0.3], [0.5] * 3))
    assert not is_sweep(sweep("sgd", [0.1, 0.2], [0.5] * 2) + sweep("deat", [0.3], [0.5]))
    assert rank_correlations(sweep("sgd", [0.1, 0.2], [0.1, 0.2])) == []
    (constant,) = rank_correlations(sweep("sgd", [0.1, 0.2, 0.3], [0.5] * 3))
    assert constant.nominal is None


def test_the_figure_shows_every_point_in_both_panels():
    points = sweep("sgd", [0.1, 0.2, 0.2], [0.3, 0.4, 0.6]) + sweep("deat", [0.1], [0.7])
    nominal, effective = sweep_plots.sweep(points).axes
    drawn = [tuple(xy) for line in nominal.lines if line.get_linestyle() == "None" for xy in line.get_xydata()]
    assert drawn == [(0.001, 0.3), (0.002, 0.4), (0.002, 0.6), (0.001, 0.7)]
    (means, _) = (line.get_xydata().tolist() for line in effective.lines if line.get_linestyle() == "-")
    assert means == [[0.001, 0.3], [0.002, 0.5]]
    assert [tick.get_text() for tick in nominal.get_xticklabels()] == ["0.001", "0.002"]


def test_ticks_do_not_crowd():
    points = sweep("sgd", [0.1, 0.101, 0.2, 1.0], [0.3] * 4)
    assert [t.get_text() for t in sweep_plots.sweep(points).axes[0].get_xticklabels()] == ["0.001", "0.002", "0.01"]


def test_the_report_of_a_sweep_draws_it(make_run, tmp_path, read):
    def run(i, lr, **report):
        training = {"epochs": 3, "batch_size": 8, "optimizer": "sgd", "momentum": 0.0, "lr": lr}
        return make_run(f"run{i}", make_run.evaluation(0.9, **report) if report else None, training=training)

    page = read(write_report([run(0, 0.1), run(1, 0.2), run(2, 0.3)], tmp_path / "a.html"))
    assert "Rank correlation with robust accuracy (validation, last epoch)" in page.text
    attacked = [run(3, 0.1, robust=0.2), run(4, 0.2, robust=0.3), run(5, 0.3, robust=0.4)]
    page = read(write_report(attacked, tmp_path / "b.html"))
    assert "Rank correlation with robust accuracy (AutoAttack) (Spearman) Runs nominal lr / batch size" in page.text
    assert "plain sgd 3 1.00 1.00" in page.text
    page = read(write_report(attacked[:2], tmp_path / "c.html"))
    assert "Rank correlation" not in page.text
    same = [run(6, 0.1, robust=0.2), run(7, 0.2, robust=0.2), run(8, 0.3, robust=0.2)]
    assert "plain sgd 3 – –" in read(write_report(same, tmp_path / "d.html")).text


def test_options_of_the_optimiser_count():
    training = PLAIN | {"optimizer": "deat", "lr": 0.3, "optimizer_options": {"k1": 0.0}}
    point = sweep_point("a", training, 0.5)
    assert point.series == "deat, k1 0.0"
    assert point.effective_ratio == pytest.approx(0.003)
