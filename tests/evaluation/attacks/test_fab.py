"""FAB against upstream's, projections and whole attacks, in float64 and float32."""

import pytest
import torch
from torch import nn

from at_extensions.evaluation.attacks.fab import FAB, PROJECTIONS, project_l1, project_l2, project_linf
from at_extensions.upstream import attack_module


def planes(seed, n=40, d=200):
    """Points in the box, some pixels at its faces, and planes: weights of many sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    t, w = rand(n, d), (rand(n, d) - 0.5) * rand(n, d) ** 2
    t[rand(n, d) < 0.05], t[rand(n, d) < 0.05], w[rand(n, d) < 0.05] = 0, 1, 0
    return t, w, (w * t).sum(1) + 2 * (rand(n) - 0.5) * rand(n) * w.abs().sum(1)


def upstream_projection(norm):
    return getattr(attack_module("fab_projections"), f"projection_{norm.lower()}")


def bisected(t, w, b, norm):
    """The truth, one point at a time: the smallest s whose step reaches the plane, by bisection."""
    above = float(w @ t - b)
    w = -w if above < 0 else w
    direction = torch.sign(w) if norm == "Linf" else w

    def moved(s):
        return (t - s * direction).clamp(0, 1) - t

    low, high = 0.0, 1.0 if norm == "Linf" else 1e8
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if float(-(w @ moved(middle))) >= abs(above) else (middle, high)
    return moved(high)


def pixel_by_pixel(t, w, b):
    """The truth in the L1 norm, one point at a time: every pixel as far as needed, those of large weights first."""
    left, step = float(b - w @ t), torch.zeros_like(t)
    for i in w.abs().argsort(descending=True).tolist():
        if w[i]:
            step[i] = max(-float(t[i]), min(1 - float(t[i]), left / float(w[i])))
            left -= float(w[i] * step[i])
    return step


@pytest.mark.parametrize("norm", PROJECTIONS)
@pytest.mark.parametrize("seed", range(5))
def test_projections_equal_the_truth_and_upstream(seed, norm):
    t, w, b = planes(seed)
    ours = PROJECTIONS[norm](t, w, b)
    moving = w if norm == "Linf" else w * (w.abs() > 1e-8)
    rows = zip(t, moving, b)
    truth = torch.stack([pixel_by_pixel(*row) if norm == "L1" else bisected(*row, norm) for row in rows])
    reached = ((w * (t + truth)).sum(1) - b).abs() < 1e-9
    assert 0.2 < reached.double().mean() < 1  # planes within the box, and beyond it
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    upstream = upstream_projection(norm)(t, w.clone(), b.clone())
    torch.testing.assert_close(ours, upstream, rtol=0, atol=1e-7)  # its running sums cancel, and cost it digits


@pytest.mark.parametrize("norm", PROJECTIONS)
def test_projections_in_float32_are_no_less_exact_than_upstream(norm):
    planes32 = [tensor.float() for tensor in planes(0, n=100, d=3072)]
    truth = PROJECTIONS[norm](*[tensor.double() for tensor in planes32])
    upstream = upstream_projection(norm)(planes32[0], planes32[1].clone(), planes32[2].clone())
    ours = PROJECTIONS[norm](*planes32)
    assert (ours - truth).norm() <= (upstream - truth).norm()
    assert (ours - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_weights_of_rounding_size_move_no_pixel(norm):
    t, w, b = planes(0)
    w[:, ::3] = 1e-9
    moved = PROJECTIONS[norm](t, w, b)
    assert (moved[:, ::3] == 0).all()
    upstream = upstream_projection(norm)(t, w.clone(), b.clone())
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
def test_linf_steps_from_the_plane_beyond_the_box_and_at_a_face(w, b, expected):
    t = torch.tensor([[0.1, 0.25, 0.5]], dtype=torch.float64)
    moved = project_linf(t, torch.tensor([w], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("w", "b", "expected"),
    [
        ([1.0, -2.0, 0.0], -0.7, [0.0, 0.15, 0.0]),  # the largest weight alone moves
        ([1.0, -2.0, 0.0], -1.95, [-0.05, 0.75, 0.0]),  # it reaches its face, the next one moves
        ([1.0, -2.0, 0.0], -9.0, [-0.1, 0.75, 0.0]),
        ([0.0, 0.0, 0.0], 1.0, [0.0, 0.0, 0.0]),
    ],
)
def test_l1_steps_by_decreasing_weight(w, b, expected):
    t = torch.tensor([[0.1, 0.25, 0.5]], dtype=torch.float64)
    moved = project_l1(t, torch.tensor([w], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("project", [project_linf, project_l2, project_l1])
def test_non_finite_planes_end_and_spoil_no_others(project):
    t, w, b = planes(0)
    w[3, 5], b[4] = float("nan"), float("inf")
    moved = project(t, w, b)
    finite = [row for row in range(len(t)) if row not in (3, 4)]
    torch.testing.assert_close(moved[finite], project(*planes(0))[finite])


RADII = {"Linf": 0.06, "L2": 0.35, "L1": 1.2}


def network(kind, dtype):
    torch.manual_seed(0)
    if kind == "smooth":
        layers = [nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, 4)]
    else:
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)]
    return nn.Sequential(*layers).to(dtype).requires_grad_(False)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def precision(request, monkeypatch):
    """Compute in this type; upstream, which casts to float32, is led to cast to it instead."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    if request.param == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("targeted", [True, False])
@pytest.mark.parametrize("kind", ["smooth", "piecewise linear"])
def test_the_same_draws_give_upstreams_points_and_verdicts(kind, targeted, norm, precision):
    model = network(kind, precision)
    x = torch.rand(24, 3, 4, 4, dtype=precision)
    y = model(x).argmax(1)
    y[:2] = (y[:2] + 1) % 4  # misclassified images are not attacked
    settings = {"norm": norm, "eps": RADII[norm], "n_restarts": 2, "n_iter": 30, "targeted": targeted, "seed": 5}
    upstream = attack_module("fab_pt").FABAttack_PT(model, n_target_classes=3, device="cpu", **settings).perturb(x, y)
    ours = FAB(model, n_target_classes=3, **settings).perturb(x, y)
    fooled = model(ours).argmax(1) != y
    assert torch.equal(fooled, model(upstream).argmax(1) != y)
    assert 2 < fooled.sum() < 24
    assert torch.equal(ours[:2], x[:2])
    torch.testing.assert_close(ours, upstream, rtol=0, atol=1e-12 if precision == torch.float64 else 1e-4)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("targeted", [True, False])
def test_random_starts_are_upstreams(targeted, norm, precision):
    model = network("smooth", precision)
    x = torch.rand(8, 3, 4, 4, dtype=precision)
    settings = {"norm": norm, "eps": RADII[norm], "targeted": targeted, "n_iter": 1}
    theirs = attack_module("fab_pt").FABAttack_PT(model, device="cpu", **settings)
    seen, boundary = [], theirs.get_diff_logits_grads_batch
    theirs.get_diff_logits_grads_batch = lambda images, *a: seen.append(images.clone()) or boundary(images, *a)
    torch.manual_seed(1)
    theirs.attack_single_run(x, model(x).argmax(1), use_rand_start=True)
    torch.manual_seed(1)
    ours = FAB(model, **settings)._random_start(x)
    torch.testing.assert_close(ours, seen[0], rtol=0, atol=1e-12 if precision == torch.float64 else 1e-6)


def test_parameters_get_no_gradients():
    model = network("smooth", torch.float32).requires_grad_(True)
    x = torch.rand(6, 3, 4, 4)
    for targeted in (True, False):
        FAB(model, eps=0.1, n_iter=3, targeted=targeted, n_target_classes=2).perturb(x, model(x).argmax(1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_minimal_perturbations_of_a_linear_model_are_the_closed_form():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double().requires_grad_(False)
    x = 0.4 + 0.2 * torch.rand(20, 3, 2, 2, dtype=torch.float64)
    model[1].bias -= model(x).mean(0)  # the boundary passes between the images
    logits = model(x)
    y, gap = logits.argmax(1), (logits[:, 0] - logits[:, 1]).abs()
    w = model[1].weight[0] - model[1].weight[1]
    for norm, dual in {"Linf": 1, "L2": 2, "L1": float("inf")}.items():
        truth = gap / torch.linalg.vector_norm(w, ord=dual)
        moved = FAB(model, norm=norm, eps=10.0, n_iter=50).perturb(x, y) - x
        order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
        found = torch.linalg.vector_norm(moved.flatten(1), ord=order, dim=1)
        assert (found >= truth * (1 - 1e-9)).all()
        assert (found <= truth * 1.01).all()
