"""The figure of the induced distribution experiment draws the numbers it is given."""

import pytest

from at_extensions.publishing.induced_plots import induced_errors


def a_row(epoch, seed=0, gap=0.2, **errors):
    nets = {name: {"error": e, "interval": [e - 0.02, e + 0.03]} for name, e in errors.items()}
    dispersion = {name: {"mean": 0.1 * i + epoch, "stderr": 0.05} for i, name in enumerate(("a", "b", "test"), 1)}
    return {"epoch": epoch, "seed": seed, "nets": nets, "dispersion": dispersion, "gap": gap}


def drawn(axes):
    """By label: the points of each curve with the ends of its bars."""
    found = {}
    for container in axes.containers:
        line, _, (bars,) = container.lines
        ends = [tuple(end for _, end in segment) for segment in bars.get_segments()]
        found[container.get_label()] = (list(zip(*line.get_data())), ends)
    return found


def test_a_single_seed_carries_its_intervals():
    figure = induced_errors([a_row(1, a=0.3, b=0.2, clean=0.25), a_row(2, a=0.5, b=0.2, clean=0.25)])
    left, right = figure.axes
    points, ends = drawn(left)["IDE on A (trained on)"]
    assert points == [(1, 0.3), (2, 0.5)]
    assert ends == [pytest.approx((0.28, 0.33)), pytest.approx((0.48, 0.53))]
    assert "A, zero start" not in drawn(left)
    (gap,) = (line for line in left.lines if line.get_label() == "robust gap of the run")
    assert gap.get_ydata().tolist() == [0.2, 0.2]
    points, ends = drawn(right)["B"]
    assert points == [(1, 1.2), (2, 2.2)]
    assert ends[0] == pytest.approx((1.15, 1.25))


def test_several_seeds_give_their_mean_and_range():
    rows = [a_row(1, seed, None, a=e, b=0.2, clean=0.2, zero=0.1) for seed, e in enumerate((0.3, 0.5, 0.4))]
    left, _ = induced_errors(rows).axes
    points, ends = drawn(left)["IDE on A (trained on)"]
    assert points == [(1, pytest.approx(0.4))]
    assert ends == [pytest.approx((0.3, 0.5))]
    assert "A, zero start" in drawn(left)
    assert not [line for line in left.lines if line.get_label() == "robust gap of the run"]
