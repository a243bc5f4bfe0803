"""The figures of random labels draw every method, rate and seed."""

import pytest

from at_extensions.publishing.memorisation_plots import instability_by_rate, memorisation_by_rate


def seed(train, flipped=None):
    values = {"last/train/clean": train, "last/train/pgd10": train / 2, "last/test/clean": 0.1, "last/test/pgd10": 0.05}
    return values if flipped is None else values | {"last/flipped/clean": flipped, "last/flipped/pgd10": flipped / 2}


def lines(axes):
    return [
        (line.get_xdata().tolist(), [round(y, 6) for y in line.get_ydata()], line.get_linestyle())
        for line in axes.lines
    ]


def test_memorisation_is_drawn_by_rate_with_the_spread_of_the_seeds():
    found = {
        "pgd": {0.0: [seed(0.8), seed(0.6)], 1.0: [seed(0.2, 0.1), seed(0.4, 0.3)]},
        "standard": {1.0: [seed(1, 1)]},
    }
    figure = memorisation_by_rate(found, "pgd10")
    train, flipped, test = figure.axes
    assert lines(train) == [([0.0, 1.0], [0.7, 0.3], "-"), ([0.0, 1.0], [0.35, 0.15], "--"), ([1.0], [1.0], "-"),
                            ([1.0], [0.5], "--")]  # fmt: skip
    assert lines(flipped)[0] == ([1.0], [0.2], "-")
    assert train.get_xticks().tolist() == [0.0, 1.0]
    spreads = [
        segment[:, 1].tolist() for c in train.collections if hasattr(c, "get_segments") for segment in c.get_segments()
    ]
    assert [0.6, 0.8] in spreads
    assert [0.2, 0.4] in spreads
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["pgd", "standard", "clean", "PGD-10"]
    figure.canvas.draw()
    assert [t.get_text() for t in test.get_xticklabels()] == ["0%", "100%"]


def curve(recomputed, frozen):
    return {"steps": [0.1, 1.0], "recomputed": {"change": recomputed}, "frozen": {"change": frozen}}


def test_instability_is_a_panel_a_rate_with_plain_ticks():
    curves = {1.0: {"pgd": [curve([0.2, 0.6], [0.1, 0.2]), curve([0.4, 0.8], [0.1, 0.4])]},
              0.0: {"trades": [curve([0.1, 0.3], [0.1, 0.3])]}}  # fmt: skip
    figure = instability_by_rate(curves)
    zero, one = figure.axes
    assert [axes.get_title(loc="left") or axes.get_title() for axes in (zero, one)] == [
        "0 % of labels redrawn", "100 % of labels redrawn",
    ]  # fmt: skip
    assert lines(one) == [([0.1, 1.0], [pytest.approx(0.3), pytest.approx(0.7)], "-"),
                          ([0.1, 1.0], [pytest.approx(0.1), pytest.approx(0.3)], "--")]  # fmt: skip
    figure.canvas.draw()
    assert [t.get_text() for t in one.get_xticklabels()] == ["0.1", "1"]
    assert lines(zero)[0][0] == [0.1, 1.0]
    assert zero.lines[0].get_color() != one.lines[0].get_color()
