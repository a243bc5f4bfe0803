"""FAB's projections against upstream's in float64, and FAB with it against FAB without."""

import pytest
import torch
from torch import nn

from at_extensions.evaluation.attacks.fab import attack_class, projection_l2, projection_linf
from at_extensions.upstream import attack_module

PROJECTIONS = {"linf": projection_linf, "l2": projection_l2}


def planes(seed, n=40, d=200):
    """Points in the box, some pixels at its faces, and planes: weights of many sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    t, w = rand(n, d), (rand(n, d) - 0.5) * rand(n, d) ** 2
    t[rand(n, d) < 0.05], t[rand(n, d) < 0.05], w[rand(n, d) < 0.05] = 0, 1, 0
    return t, w, (w * t).sum(1) + 2 * (rand(n) - 0.5) * rand(n) * w.abs().sum(1)


def bisected(t, w, b, norm):
    """The truth, one point at a time: the smallest s whose step reaches the plane, by bisection."""
    above = float(w @ t - b)
    w = -w if above < 0 else w
    direction = torch.sign(w) if norm == "linf" else w

    def moved(s):
        return (t - s * direction).clamp(0, 1) - t

    low, high = 0.0, 1.0 if norm == "linf" else 1e8
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if float(-(w @ moved(middle))) >= abs(above) else (middle, high)
    return moved(high)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", range(5))
def test_the_projection_is_that_of_bisection_and_of_upstream(seed, norm):
    t, w, b = planes(seed)
    ours = PROJECTIONS[norm](t, w, b)
    moving = w if norm == "linf" else w * (w.abs() > 1e-8)
    truth = torch.stack([bisected(*row, norm) for row in zip(t, moving, b)])
    reached = ((w * (t + truth)).sum(1) - b).abs() < 1e-9
    assert 0.2 < reached.double().mean() < 1  # planes within the box, and beyond it
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    upstream = getattr(attack_module("fab_projections"), f"projection_{norm}")(t, w.clone(), b.clone())
    torch.testing.assert_close(ours, upstream, rtol=0, atol=1e-8)  # its running sums cancel, and cost it digits


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_in_float32_it_is_no_less_exact_than_upstream(norm):
    planes32 = [tensor.float() for tensor in planes(0, n=100, d=3072)]
    truth = PROJECTIONS[norm](*[tensor.double() for tensor in planes32])
    upstream = getattr(attack_module("fab_projections"), f"projection_{norm}")(*planes32)
    ours = PROJECTIONS[norm](*planes32)
    assert (ours - truth).norm() <= (upstream - truth).norm()
    assert (ours - truth).norm() < 1e-5 * truth.norm()


def test_weights_of_next_to_nothing_move_no_pixel_in_the_euclidean_norm():
    t, w, b = planes(0)
    w[:, ::3] = 1e-9
    moved = projection_l2(t, w, b)
    assert (moved[:, ::3] == 0).all()
    upstream = attack_module("fab_projections").projection_l2(t, w.clone(), b.clone())
    torch.testing.assert_close(moved, upstream, rtol=0, atol=1e-6)  # upstream loses digits over them
    assert moved.abs().amax(1).min() > 0


@pytest.mark.parametrize(
    ("w", "b", "expected"),
    [
        ([1.0, -2.0, 0.0], 0.1 - 0.5, [0.0, 0.0, 0.0]),  # on the plane
        ([1.0, -2.0, 0.0], -9.0, [-0.1, 0.75, 0.0]),  # the plane is below the box: to its lowest corner
        ([1.0, -2.0, 0.0], 9.0, [0.9, -0.25, 0.0]),  # above it: to the highest
        ([0.0, 0.0, 0.0], 1.0, [0.0, 0.0, 0.0]),  # there is no plane
        ([1.0, -2.0, 0.0], -0.7, [-0.1, 0.1, 0.0]),
        ([1.0, -2.0, 0.0], -1.0, [-0.1, 0.25, 0.0]),  # the first pixel is at its face, the second goes on
    ],
)
def test_what_is_on_the_plane_beyond_the_box_or_at_a_face(w, b, expected):
    t = torch.tensor([[0.1, 0.25, 0.5]], dtype=torch.float64)
    moved = projection_linf(t, torch.tensor([w], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("project", PROJECTIONS.values())
def test_numbers_that_are_none_end_it_too(project):
    t, w, b = planes(0)
    w[3, 5], b[4] = float("nan"), float("inf")
    moved = project(t, w, b)
    fine = [row for row in range(len(t)) if row not in (3, 4)]
    torch.testing.assert_close(moved[fine], project(*planes(0))[fine])


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L1", 4.0)])
@pytest.mark.parametrize("targeted", [True, False])
def test_fab_with_it_goes_where_fab_goes_without(targeted, norm, eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, 4)).requires_grad_(False)
    x = torch.rand(12, 3, 4, 4)
    y = model(x).argmax(1)
    settings = {"norm": norm, "eps": eps, "n_restarts": 2, "n_iter": 20, "targeted": targeted, "device": "cpu"}
    upstream = attack_module("fab_pt").FABAttack_PT
    outcomes = []
    for kind in (upstream, attack_class()):
        outcomes.append(kind(model, n_target_classes=3, seed=0, **settings).perturb(x, y))
    assert (model(outcomes[0]).argmax(1) != y).double().mean() > 0.3
    torch.testing.assert_close(*outcomes, rtol=0, atol=1e-4)


def test_upstream_stays_as_it_is():
    base = attack_module("fab_base")
    kind = attack_class()
    assert base.projection_linf is attack_module("fab_projections").projection_linf
    assert issubclass(kind, attack_module("fab_pt").FABAttack_PT)
    assert "attack_single_run" not in vars(attack_module("fab_pt").FABAttack_PT)
    assert kind.attack_single_run.__globals__["projection_linf"] is projection_linf
    assert kind.attack_single_run.__globals__["projection_l2"] is projection_l2
    assert kind.attack_single_run.__globals__["projection_l1"] is base.projection_l1
