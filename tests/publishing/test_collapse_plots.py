"""Figures of catastrophic overfitting: the numbers that they draw."""

import math

import pytest

from at_extensions.publishing import collapse_plots


def cell(eps, beta, robust, collapsed):
    return {"eps": eps / 255, "beta": beta / 255, "robust": robust, "collapsed": collapsed, "runs": 3}


def test_the_map_has_a_colour_and_a_count_a_cell_and_frames_where_runs_collapsed():
    cells = {"fgsm": [cell(4, 0, 0.5, 0), cell(4, 8, 0.1, 2), cell(8, 8, 0.0, 3)], "pgd": [cell(4, 8, 0.4, 0)]}
    figure = collapse_plots.collapse_map(cells)
    fgsm, pgd = (axes for axes in figure.axes if axes.images)
    assert [t.get_text() for t in fgsm.get_yticklabels()] == ["8/255", "4/255"]
    assert [t.get_text() for t in fgsm.get_xticklabels()] == ["0", "8/255"]
    drawn = fgsm.images[0].get_array().filled(math.nan).tolist()
    assert drawn[1] == [0.5, 0.1]
    assert drawn[0][1] == 0.0
    assert math.isnan(drawn[0][0])
    assert {(t.get_position(), t.get_text()) for t in fgsm.texts} == {((0, 1), "0/3"), ((1, 1), "2/3"), ((1, 0), "3/3")}
    assert sorted(round(p.get_x() + 0.46) for p in fgsm.patches) == [1, 1]
    assert len(pgd.patches) == 0


def test_curves_are_a_line_a_run_and_quantity():
    rows = [[{"epoch": e, "train_accuracy": 0.1 * e, "val_robust_accuracy": 0.2} for e in (1, 2)] for _ in range(2)]
    figure = collapse_plots.collapse_curves({"a": rows, "b": [*rows[:1], [{"epoch": 1, "train_accuracy": 0.7}]]})
    a, b = (axes for axes in figure.axes if axes.get_visible())
    assert sorted(line.get_ydata().tolist() for line in a.lines) == [[0.1, 0.2], [0.1, 0.2], [0.2, 0.2], [0.2, 0.2]]
    assert [0.7] in [list(line.get_ydata()) for line in b.lines]
    assert a.get_title(loc="left") == "a"


@pytest.mark.parametrize("draw", [collapse_plots.collapse_map, collapse_plots.collapse_curves])
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(ValueError, match="no"):
        draw({})
