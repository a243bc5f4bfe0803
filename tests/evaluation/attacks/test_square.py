"""Square with its own loop against upstream's: the same draws, the same images."""

import pytest
import torch
from torch import nn

from at_extensions.evaluation.attacks.square import attack_class
from at_extensions.evaluation.attacks.windows import Windows, windows_of
from at_extensions.evaluation.searching import search_model
from at_extensions.folding import TwinWarning
from at_extensions.models import create_model
from at_extensions.upstream import attack_module


def problem(n=24, size=12, num_classes=4):
    torch.manual_seed(1)
    model = create_model("small_cnn", num_classes, width=6).eval().requires_grad_(False)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    x = torch.rand(n, 3, size, size)
    model.network.classifier.bias -= model(x).mean(0)  # so that every class is somebody's
    return model, x, model(x).argmax(1)


def outcomes(model, x, y, kinds, **settings):
    settings = {"norm": "Linf", "eps": 0.03, "n_queries": 300, "seed": 5, "device": "cpu"} | settings
    attacks = [kind(model, **settings) for kind in kinds]
    return [attack.perturb(x.clone(), y.clone()) for attack in attacks]


@pytest.fixture
def looks(monkeypatch):
    """What was computed in windows: how many images each time."""
    seen = []
    look = Windows.look

    def counting(self, window, top, left):
        seen.append(len(window))
        return look(self, window, top, left)

    monkeypatch.setattr(Windows, "look", counting)
    return seen


KINDS = (attack_module("square").SquareAttack, attack_class())


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("resc_schedule", [False, True])
def test_it_finds_what_upstream_finds(looks, restarts, resc_schedule):
    model, x, y = problem()
    more = {"n_restarts": restarts, "resc_schedule": resc_schedule}
    theirs, ours = outcomes(model, x, y, KINDS, **more)
    fell = model(theirs).argmax(1) != y
    assert 0.1 < fell.double().mean() < 0.9
    assert torch.equal(ours, theirs)
    assert not looks  # the model itself has no windows


def test_it_finds_the_same_in_windows(looks):
    model, x, y = problem()
    search = search_model(model, x)
    theirs, ours = outcomes(search, x, y, KINDS, n_queries=1200, eps=0.01)
    fell = model(theirs).argmax(1) != y
    assert 0.1 < fell.double().mean() < 0.9
    assert torch.equal(model(ours).argmax(1) != y, fell)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert len(looks) > 600  # all but the largest squares
    assert len(set(looks)) > 1  # those that fell are left out, sooner or later


def test_what_the_model_says_of_the_best_images_is_what_the_attack_believes():
    """However often windows were accepted."""
    model, x, y = problem()
    search = search_model(model, x)
    attack = attack_class()(search, norm="Linf", eps=0.02, n_queries=400, seed=0, device="cpu")
    attack.init_hyperparam(x)
    torch.manual_seed(0)
    queries, best = attack.attack_single_run(x, y)
    logits = model(best)
    margin = logits.gather(1, y[:, None]).squeeze(1) - logits.scatter(1, y[:, None], -torch.inf).amax(1)
    assert torch.equal(queries < 401, margin <= 0)  # those that fell were asked for no more
    assert ((best - x).abs().amax((1, 2, 3)) <= 0.02 + 1e-6).all()
    assert best.min() >= 0
    assert best.max() <= 1


def test_windows_that_do_not_tell_what_the_model_does_are_not_used(looks):
    """A trace shows a sum where the model overwrites what it reads again."""

    class Overwrites(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.conv, self.identity = model, nn.Conv2d(3, 3, 1), nn.Identity()

        def forward(self, x):
            x = self.conv(x)
            same = self.identity(x)
            same += 0.5
            return self.model(x + same)

    model, x, _ = problem()
    model = Overwrites(model).eval().requires_grad_(False)
    model.model.network.classifier.bias -= model(x).mean(0)
    y = model(x).argmax(1)
    search = search_model(model, x)
    assert windows_of(search) is not None
    with pytest.warns(TwinWarning, match="differ from those of the whole image"):
        theirs, ours = outcomes(search, x, y, KINDS)
    assert len(looks) == 1
    assert (model(theirs).argmax(1) != y).any()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("norm", "eps"), [("L2", 0.5), ("L1", 3.0)])
def test_other_norms_are_upstreams(norm, eps):
    model, x, y = problem(size=20)
    theirs, ours = outcomes(model, x, y, KINDS, norm=norm, eps=eps, n_queries=60)
    assert torch.equal(ours, theirs)
    assert (model(ours).argmax(1) != y).any()


def test_a_targeted_one_and_one_on_cross_entropy_are_upstreams():
    model, x, y = problem()
    theirs, ours = outcomes(model, x, y, KINDS, loss="ce", n_queries=60)
    assert torch.equal(ours, theirs)


def test_images_that_are_not_square_and_smaller_than_the_first_square():
    model, _, _ = problem()
    x = torch.rand(6, 3, 16, 9)
    y = model(x).argmax(1)
    theirs, ours = outcomes(model, x, y, KINDS, n_queries=100, eps=0.05)
    assert torch.equal(ours, theirs)
    search = search_model(model, x)
    theirs, ours = outcomes(search, x, y, KINDS, n_queries=100, eps=0.05)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_in_bfloat16_windows_come_from_the_twin(looks):
    model, x, y = problem()
    search = search_model(model, x, "bf16")
    (ours,) = outcomes(search, x, y, KINDS[1:], eps=0.1, n_queries=500)
    assert looks
    assert (model(ours).argmax(1) != y).double().mean() > 0.5


def test_upstream_stays_as_it_is():
    assert issubclass(KINDS[1], KINDS[0])
    assert KINDS[1].perturb is KINDS[0].perturb
    assert KINDS[1].attack_single_run is not KINDS[0].attack_single_run


def test_windows_that_fail_are_not_used_and_a_warning_says_why(monkeypatch):
    model, x, y = problem()
    search = search_model(model, x)
    (theirs,) = outcomes(search, x, y, KINDS[:1])
    monkeypatch.setattr(Windows, "look", lambda *args: 1 / 0)
    with pytest.warns(TwinWarning, match="division by zero"):
        (ours,) = outcomes(search, x, y, KINDS[1:])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
