"""N-FGSM against its two lines of mathematics written out, and the radius k eps + alpha."""

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from at_extensions.attacks import NFGSM


def clip(value):
    return min(max(value, 0.0), 1.0)


def slow_nfgsm(net, images, labels, eps, alpha, k, seed):
    """One image and one pixel at a time, with the noise that the seed gives."""
    torch.manual_seed(seed)
    noise = torch.empty_like(images).uniform_(-k * eps, k * eps)
    out = []
    for image, eta, label in zip(images, noise, labels):
        noisy = [clip(p + e) for p, e in zip(image.flatten().tolist(), eta.flatten().tolist())]
        x = torch.tensor(noisy, dtype=images.dtype).view(1, *image.shape).requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(net(x), label[None]), x)[0].flatten().tolist()
        out.append([clip(p + alpha * ((g > 0) - (g < 0))) for p, g in zip(noisy, gradient)])
    return torch.tensor(out, dtype=images.dtype).view_as(images)


@pytest.mark.parametrize(("alpha", "k"), [(None, 2.0), (0.05, 1.0), (0.2, 0.5), (0.03, 0.0)])
def test_it_equals_the_written_out_reference(small_net, batch, alpha, k):
    net, (images, labels) = small_net(1, train=False), batch(2)
    torch.manual_seed(3)
    adversarial = NFGSM(net, 0.1, alpha, k)(images, labels)
    expected = slow_nfgsm(net, images, labels, 0.1, 0.1 if alpha is None else alpha, k, 3)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-15)


@settings(max_examples=60)
@given(
    eps=st.floats(1e-4, 1.0),
    alpha=st.one_of(st.none(), st.floats(1e-4, 1.0)),
    k=st.floats(0, 3),
    kind=st.sampled_from(["inside", "black", "white", "corners"]),
    seed=st.integers(0, 2**31),
)
def test_radius_and_box_hold(small_net, batch, eps, alpha, k, kind, seed):
    net = small_net(seed, dtype=torch.float32, train=False)
    images, labels = batch(seed, dtype=torch.float32)
    images = {"inside": images, "black": images * 0, "white": images * 0 + 1, "corners": images.round()}[kind]
    adversarial = NFGSM(net, eps, alpha, k)(images, labels)
    assert adversarial.dtype == torch.float32
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= k * eps + (eps if alpha is None else alpha) + 1e-6


def test_the_perturbation_is_not_projected_and_reaches_its_radius(linear_net, batch):
    net, (_, labels) = linear_net(4, size=32), batch(5, num_classes=2)
    images = torch.full((4, 2, 32, 32), 0.5, dtype=torch.float64)
    torch.manual_seed(6)
    moved = (NFGSM(net, 0.05)(images, labels) - images).abs()
    assert 0.149 < moved.max() <= 0.15 + 1e-15  # 2 eps + eps
    beyond_eps = (moved > 0.05).double().mean().item()
    assert beyond_eps == pytest.approx(0.5, abs=0.03)  # |U(-2, 2) + 1| > 1 for half of all draws


def test_without_noise_it_is_fgsm(small_net, batch):
    net, (images, labels) = small_net(7, train=False), batch(8)
    expected = torchattacks.FGSM(net, eps=0.1)(images, labels)
    torch.testing.assert_close(NFGSM(net, 0.1, k=0)(images, labels), expected, rtol=0, atol=1e-15)


def test_targets_and_losses_of_ones_own(small_net, batch):
    net, (images, labels) = small_net(9, train=False), batch(10)
    attack = NFGSM(net, 0.1, k=0)
    each = attack(images, labels, loss=lambda logits: -F.cross_entropy(logits, (labels + 1) % 3, reduction="none"))
    attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 3, quiet=True)
    assert torch.equal(attack(images, labels), each)
    assert not torch.equal(each, NFGSM(net, 0.1, k=0)(images, labels))


def test_it_changes_neither_its_input_nor_the_model(small_net, batch, untouched):
    net, (images, labels) = small_net(11, train=False), batch(12)
    before = images.clone()
    with untouched(net, but=("torch's random state",)):
        NFGSM(net, 0.1)(images, labels)
    assert torch.equal(images, before)


def test_it_follows_its_model_to_another_device_and_never_waits_for_it(small_net, batch):
    net = small_net(13, dtype=torch.float32)
    attack = NFGSM(net, 0.1)
    net.to("meta")
    assert attack(*batch(14, dtype=torch.float32)).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eps": 8}, "did you mean 8/255"),
        ({"alpha": 0}, r"alpha must lie in \(0, inf\)"),
        ({"k": -1}, r"k must lie in \[0, inf\)"),
    ],
)
def test_bad_numbers_are_refused(linear_net, options, says):
    with pytest.raises(ValueError, match=says):
        NFGSM(linear_net(), **options)
