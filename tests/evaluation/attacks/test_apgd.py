"""APGD that discards fooled images: the same verdicts, for fewer evaluations of the model."""

import pytest
import torch
from torch import nn

from at_extensions.evaluation.attacks.apgd import MARGIN, Discarding, attack_classes, is_clearly_fooled
from at_extensions.evaluation.flags import Warnings
from at_extensions.upstream import attack_module

EPS = {"Linf": 0.09, "L2": 0.5, "L1": 2.0}


class Counting(nn.Module):
    """A smooth classifier that counts the images it evaluates."""

    def __init__(self, num_classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.Tanh(), nn.Linear(30, num_classes))
        self.requires_grad_(False)
        self.evaluated = 0

    def forward(self, x):
        self.evaluated += len(x)
        return self.net(x)


def problem():
    model = Counting()
    x = torch.rand(40, 3, 4, 4)
    return model, x, model.net(x).argmax(1)


def upstream_classes():
    module = attack_module("autopgd_base")
    return module.APGDAttack, module.APGDAttack_targeted


def run(kinds, targeted, norm, *, loss="ce", eot_iter=1, largereps=False, eps=None):
    model, x, y = problem()
    logger = Warnings()
    shared = {"n_iter": 30, "norm": norm, "eps": eps or EPS[norm], "seed": 3, "device": "cpu", "logger": logger}
    if targeted:
        attack = kinds[1](model, n_target_classes=4, eot_iter=eot_iter, use_largereps=largereps, **shared)
    else:
        attack = kinds[0](model, n_restarts=2, loss=loss, eot_iter=eot_iter, use_largereps=largereps, **shared)
    adversarial = attack.perturb(x, y)
    return model, x, y, adversarial, logger.zero_gradients


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize(("targeted", "loss"), [(False, "ce"), (False, "dlr"), (True, None)])
def test_the_same_images_are_fooled_with_fewer_evaluations(targeted, loss, norm):
    model, x, y, ours, zeros = run(attack_classes(), targeted, norm, loss=loss)
    evaluated = model.evaluated
    model, _, _, theirs, their_zeros = run(upstream_classes(), targeted, norm, loss=loss)
    fooled, fooled_there = (model.net(points).argmax(1) != y for points in (ours, theirs))
    assert torch.equal(fooled, fooled_there)
    assert 0.2 < fooled.double().mean() < 0.9
    assert evaluated < (0.97 if targeted else 0.9) * model.evaluated
    assert zeros == their_zeros
    assert torch.equal(ours[~fooled], x[~fooled])
    distance = torch.linalg.vector_norm((ours - x).flatten(1), ord={"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert distance.max() <= EPS[norm] * (1 + 1e-5)
    assert is_clearly_fooled(model.net(ours), y)[fooled].double().mean() > 0.6  # not by a hair, if it can be


@pytest.mark.parametrize(("norm", "more"), [("Linf", {"eot_iter": 2}), ("L1", {"largereps": True})])
@pytest.mark.parametrize("targeted", [False, True])
def test_no_image_is_discarded_where_one_point_proves_nothing(targeted, norm, more):
    ours, theirs = (run(kinds, targeted, norm, **more) for kinds in (attack_classes(), upstream_classes()))
    assert torch.equal(ours[3], theirs[3])
    assert ours[0].evaluated == theirs[0].evaluated


def test_one_image_is_evaluated_after_all_are_fooled():
    model, _, y, adversarial, _ = run(attack_classes(), False, "Linf", eps=0.5)
    assert (model.net(adversarial).argmax(1) != y).all()
    assert model.evaluated < 5 * len(y) + 31


def test_logits_of_robust_images_and_constants_for_the_others():
    model, x, y = problem()
    x = x.double().requires_grad_()
    model.double()
    y = y.clone()
    y[::2] = model.net(x)[::2].topk(2, dim=1).indices[:, 1]  # where the model is wrong, in part by little
    discarding = Discarding(model, y)
    first = discarding(x)
    assert torch.equal(first, model.net(x))
    gone = is_clearly_fooled(first, y)
    assert torch.equal(discarding.rows, (~gone).nonzero().flatten())
    assert 0 < gone[::2].sum() < 20
    second = discarding(x)
    torch.testing.assert_close(second[~gone], first[~gone])
    assert (second[gone].argmax(1) == y[gone]).all()
    grad = torch.autograd.grad(nn.functional.cross_entropy(second, y, reduction="sum"), x)[0]
    expected = torch.autograd.grad(nn.functional.cross_entropy(model.net(x)[~gone], y[~gone], reduction="sum"), x)[0]
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert (grad[gone] == 0).all()
    discarding(x)
    assert torch.equal(discarding.rows, (~gone).nonzero().flatten())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_margin_is_relative_to_the_logits_spread(scale):
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.95, 0.0], [1.95, 2.0, 0.0], [1.5, 2.0, 0.0]])
    assert MARGIN == 0.1
    beyond = is_clearly_fooled(scale * logits, torch.tensor([0, 0, 0, 0]))
    assert beyond.tolist() == [True, False, False, True]


def test_upstream_classes_are_unchanged():
    for ours, theirs in zip(attack_classes(), upstream_classes()):
        assert issubclass(ours, theirs)
        assert ours.attack_single_run is not theirs.attack_single_run
    assert attack_classes()[0].perturb is upstream_classes()[0].perturb


def test_the_model_is_restored_after_an_error():
    _, x, y = problem()
    attack = attack_classes()[0](lambda x: 1 / 0, n_iter=3, norm="Linf", eps=0.1, device="cpu")
    attack.init_hyperparam(x)
    given = attack.model
    with pytest.raises(ZeroDivisionError):
        attack.attack_single_run(x, y)
    assert attack.model is given
