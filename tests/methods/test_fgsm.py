"""The single-step methods against their one line of mathematics."""

import pytest
import torch
import torchattacks
from torch.nn import functional as F

from at_extensions.attacks import RandomStream, perturb
from at_extensions.methods import FGSMAT

EPS = 0.1


def signed_gradient(net, x, labels):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), labels), x)[0].sign()


def uniform(images, radius, seed):
    with RandomStream(seed).on(images.device):
        return torch.empty_like(images).uniform_(-radius, radius)


def expected(net, images, labels, variant, alpha, k, seed):
    """The three attacks as their papers write them, on a model in eval mode."""
    if variant == "plain":
        return (images + EPS * signed_gradient(net, images, labels)).clamp(0, 1)
    if variant == "rs":
        alpha = 1.25 * EPS if alpha is None else alpha
        start = (images + uniform(images, EPS, seed)).clamp(0, 1)
        delta = start + alpha * signed_gradient(net, start, labels) - images
        return (images + delta.clamp(-EPS, EPS)).clamp(0, 1)
    alpha, k = EPS if alpha is None else alpha, 2.0 if k is None else k
    start = (images + uniform(images, k * EPS, seed)).clamp(0, 1)
    return (start + alpha * signed_gradient(net, start, labels)).clamp(0, 1)


@pytest.mark.parametrize(
    ("variant", "alpha", "k"),
    [("plain", None, None), ("plain", EPS, None), ("rs", None, None), ("rs", 0.04, None), ("n", None, None),
     ("n", 0.05, 1.0), ("n", None, 0.0)],
)  # fmt: skip
def test_each_variant_is_its_papers_attack(small_net, batch, variant, alpha, k):
    net, (images, labels) = small_net(1, train=False), batch(2)
    method = FGSMAT(net, eps=EPS, alpha=alpha, k=k, variant=variant, seed=3)
    found = method.perturb(images, labels)
    torch.testing.assert_close(found, expected(net, images, labels, variant, alpha, k, 3), rtol=0, atol=1e-14)


def test_n_fgsm_is_what_one_gets(small_net, batch):
    images, labels = batch(4)
    default, n = FGSMAT(small_net(5)), FGSMAT(small_net(5), variant="n", eps=8 / 255, alpha=8 / 255, k=2)
    assert torch.equal(default.perturb(images, labels), n.perturb(images, labels))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "free"}, "unknown variant 'free'; known: n, plain, rs"),
        ({"variant": "plain", "alpha": 0.05}, "plain FGSM steps by eps=0.1; it takes no alpha"),
        ({"variant": "plain", "k": 2.0}, "k is N-FGSM's noise radius; variant 'plain' takes none"),
        ({"variant": "rs", "k": 1.0}, "variant 'rs' takes none"),
        ({"variant": "rs", "alpha": 0}, "alpha must lie in"),
        ({"k": -1.0}, "k must lie in"),
    ],
)
def test_numbers_that_a_variant_does_not_have_are_refused(small_net, options, says):
    with pytest.raises(ValueError, match=says):
        FGSMAT(small_net(), eps=EPS, **options)


@pytest.mark.parametrize(
    ("variant", "theirs"),
    [("plain", lambda net: torchattacks.FGSM(net, EPS)), ("rs", lambda net: torchattacks.FFGSM(net, EPS, 1.25 * EPS))],
)
def test_single_steps_are_those_of_torchattacks(small_net, batch, monkeypatch, variant, theirs):
    monkeypatch.setattr(
        torch, "randn_like", torch.empty_like
    )  # it draws normal numbers first, and then throws them away
    net, (images, labels) = small_net(7, train=False), batch(8)
    found = FGSMAT(net, eps=EPS, variant=variant, seed=5).perturb(images, labels)
    expected = perturb(theirs(net), images, labels, stream=RandomStream(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("variant", ["plain", "rs", "n"])
def test_images_may_have_a_range_of_their_own(small_net, batch, variant):
    net, (images, labels) = small_net(9, train=False), batch(10)
    images = 1.4 * images - 0.2
    method = FGSMAT(net, eps=EPS, variant=variant)
    method.image_range = (-0.2, 1.2)
    adversarial = method.perturb(images, labels)
    assert adversarial.min() >= -0.2
    assert adversarial.max() <= 1.2
    assert ((adversarial < 0) | (adversarial > 1)).float().mean() > 0.1
    assert (adversarial - images).abs().max() <= (3 if variant == "n" else 1) * EPS + 1e-12
