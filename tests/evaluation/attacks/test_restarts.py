"""PGD with restarts: a slow loop's verdicts, for fewer evaluations of the model."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.evaluation import evaluate
from at_extensions.evaluation.attacks.restarts import RestartedPGD

EPS = {"Linf": 0.06, "L2": 0.35}


class Counting(nn.Module):
    """A smooth classifier that counts the images it evaluates."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, 5)).to(dtype)
        self.requires_grad_(False)
        self.evaluated = 0

    def forward(self, x):
        self.evaluated += len(x)
        return self.net(x)


def problem(dtype=torch.float64):
    model = Counting(dtype)
    x = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    y = model.net(x).argmax(1)
    y[:3] = (y[:3] + 1) % 5  # misclassified from the beginning
    return model, x, y


def slow(model, x, y, norm, eps, *, steps, restarts, seed):
    """Every image alone, every restart from the same starts, every iterate looked at; return which ones are fooled."""
    generator = torch.Generator().manual_seed(seed)
    fooled = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(restarts):
        if norm == "Linf":
            starts = x + eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
        else:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            radius = torch.rand(len(x), 1, 1, 1, generator=generator, dtype=x.dtype) ** (1 / x[0].numel())
            starts = x + eps * radius * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        for i in range(len(x)):
            image, label, point = x[i : i + 1], y[i : i + 1], starts[i : i + 1].clamp(0, 1)
            for step in range(steps + 1):
                point = point.detach().requires_grad_()
                logits = model.net(point)
                fooled[i] |= logits.argmax(1).item() != label.item()
                if step == steps:
                    break
                (gradient,) = torch.autograd.grad(F.cross_entropy(logits, label), point)
                if norm == "Linf":
                    point = point + eps / 4 * gradient.sign()
                    point = image + (point - image).clamp(-eps, eps)
                else:
                    move = point + eps / 4 * gradient / gradient.norm() - image
                    point = image + move * min(1.0, eps / move.norm().item())
                point = point.clamp(0, 1)
    return fooled


@pytest.mark.parametrize("norm", EPS)
def test_the_verdicts_are_a_slow_loops_for_fewer_evaluations(norm):
    model, x, y = problem()
    attack = RestartedPGD(model, norm=norm, eps=EPS[norm], n_iter=7, n_restarts=4, seed=5)
    adversarial = attack.perturb(x.clone(), y.clone())
    evaluated, wrong = model.evaluated, model.net(adversarial).argmax(1) != y
    assert torch.equal(wrong, slow(model, x, y, norm, EPS[norm], steps=7, restarts=4, seed=5))
    assert 0.2 < wrong.double().mean() < 0.9
    assert evaluated < 0.75 * 40 * 8 * 4
    order = torch.inf if norm == "Linf" else 2
    assert torch.linalg.vector_norm((adversarial - x).flatten(1), ord=order, dim=1).max() <= EPS[norm] * (1 + 1e-9)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(adversarial[~wrong], x[~wrong])
    assert torch.equal(adversarial[:3], x[:3])  # misclassified images are not attacked


def test_restarts_fool_more_images_and_never_fewer():
    model, x, y = problem()
    found = [
        model.net(RestartedPGD(model, eps=0.045, alpha=0.004, n_iter=2, n_restarts=n).perturb(x, y)).argmax(1) != y
        for n in (1, 12)
    ]
    assert found[1].sum() > found[0].sum()
    assert not (found[0] & ~found[1]).any()


def test_an_image_without_gradient_stays_where_the_start_put_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    x = torch.rand(4, 3, 4, 4)
    for norm in EPS:
        adversarial = RestartedPGD(model, norm=norm, eps=0.1, n_iter=3, n_restarts=2).perturb(x, torch.zeros(4).long())
        assert torch.equal(adversarial, x)
        assert adversarial.isfinite().all()


def test_an_evaluation_by_pgd_50_10(linear, make_images, label):
    """On a linear model of two classes, an image is robust if its margin exceeds eps times the difference's L1 norm."""
    model, x = linear(2), make_images(40)
    y, eps = label(model, x, wrong=4), 0.006
    report = evaluate(model, x, y, eps=eps, version="pgd-50-10", progress=False)
    gap = model.weight[y] - model.weight[1 - y]
    margin = (gap * x.flatten(1)).sum(1) + model.bias[y] - model.bias[1 - y]
    assert torch.equal(report.robust, margin > eps * gap.abs().sum(1))
    assert 0.1 < report.robust_accuracy < report.clean_accuracy - 0.1
    assert list(report.after_attack) == ["pgd-50-10"]
    assert report.settings["pgd-50-10"]["n_restarts"] == 10
    assert "pgd-50-10" in repr(report)
    both = evaluate(model, x, y, eps=eps, version="custom", attacks=["apgd-ce", "pgd-50-10"], progress=False)
    assert torch.equal(both.robust, report.robust)


def test_a_resumed_evaluation_and_bf16(linear, make_images, label, tmp_path):
    model, x = linear(2), make_images(20)
    y = label(model, x)
    settings = {"eps": 0.006, "version": "pgd-50-10", "progress": False, "batch_size": 7}
    first = evaluate(model, x, y, state_dir=tmp_path, **settings)
    again = evaluate(model, x, y, state_dir=tmp_path, **settings)
    assert torch.equal(first.robust, again.robust)
    low = evaluate(model, x, y, precision="bf16", **settings)
    assert (low.robust | ~first.robust).all()  # each example is verified in fp32
    assert low.robust_accuracy < 1


def test_l1_and_upstreams_interface_have_no_such_version(linear, make_images):
    from autoattack import AutoAttack

    with pytest.raises(ValueError, match="L1"):
        evaluate(linear(4), make_images(2), torch.zeros(2).long(), norm="L1", eps=1.0, version="pgd-50-10")
    with pytest.raises(ValueError, match="defined for Linf and L2"):
        RestartedPGD(None, norm="L1", eps=1.0)
    with pytest.raises(ValueError, match="pgd-50-10"):
        AutoAttack(linear(4), eps=0.1, device="cpu", version="pgd-50-10")
