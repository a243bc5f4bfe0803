"""PGD against closed forms on a linear model, torchattacks' own, and the radius and box it promises."""

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from at_extensions.attacks import PGD
from at_extensions.attacks.pgd import STARTS


@settings(max_examples=60)
@given(
    eps=st.floats(1e-4, 1.0),
    alpha=st.floats(1e-4, 2.0),
    steps=st.integers(1, 3),
    start=st.sampled_from(STARTS),
    kind=st.sampled_from(["inside", "black", "white", "corners"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_radius_and_box_hold(small_net, batch, eps, alpha, steps, start, kind, dtype, seed):
    net = small_net(seed, dtype=dtype, train=False)
    images, labels = batch(seed, dtype=dtype)
    images = {"inside": images, "black": images * 0, "white": images * 0 + 1, "corners": images.round()}[kind]
    adversarial = PGD(net, eps, alpha, steps, start)(images, labels)
    assert adversarial.shape == images.shape
    assert adversarial.dtype == dtype
    assert not adversarial.requires_grad
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial - images).abs().max() <= eps + (1e-6 if dtype == torch.float32 else 1e-15)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("eps", [1e-4, 0.2])
def test_the_model_is_asked_only_within_radius_and_box(small_net, batch, start, eps):
    net, (images, labels) = small_net(22, train=False), batch(23)
    asked = []
    net.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[0].detach()))
    PGD(net, eps, eps, 3, start)(images, labels)
    assert len(asked) == 3
    for x in asked:
        assert (x - images).abs().max() <= eps + 1e-15
        assert x.min() >= 0
        assert x.max() <= 1


@pytest.mark.parametrize("start", STARTS)
def test_on_a_linear_model_it_reaches_the_closed_form_optimum(linear_net, batch, start):
    net, (images, labels) = linear_net(1, num_classes=2), batch(2, 8, num_classes=2)
    eps = 0.3
    weight = net[1].weight
    direction = (weight[1 - labels] - weight[labels]).sign().view_as(images)  # what raises the wrong class's logit
    best = (images + eps * direction).clamp(0, 1)
    adversarial = PGD(net, eps, alpha=0.05, steps=13, start=start)(images, labels)  # 13 * 0.05 > 2 eps
    assert torch.equal(adversarial, best)


def test_a_margin_loss_reaches_its_closed_form_optimum_with_many_classes(linear_net, batch):
    net, (images, labels) = linear_net(3, num_classes=5), batch(4, 6, num_classes=5)
    targets = (labels + 2) % 5
    rows = torch.arange(6)

    def margin(logits):
        return logits[rows, targets] - logits[rows, labels]

    weight = net[1].weight
    direction = (weight[targets] - weight[labels]).sign().view_as(images)
    adversarial = PGD(net, 0.2, 0.1, 5)(images, labels, loss=margin)
    assert torch.equal(adversarial, (images + 0.2 * direction).clamp(0, 1))


MODES = {
    "default": lambda attack: None,
    "by function": lambda attack: attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 3, quiet=True),
    "by label": lambda attack: attack.set_mode_targeted_by_label(quiet=True),
    "least likely": lambda attack: attack.set_mode_targeted_least_likely(kth_min=2, quiet=True),
    "random": lambda attack: attack.set_mode_targeted_random(quiet=True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("start", ["uniform", "zero"])
def test_without_a_loss_it_is_torchattacks_pgd(small_net, batch, mode, start):
    net, (images, labels) = small_net(5), batch(6, 8)
    pair = [PGD(net, 0.1, 0.03, 4, start), torchattacks.PGD(net, 0.1, 0.03, 4, random_start=start == "uniform")]
    found = []
    for attack in pair:
        MODES[mode](attack)
        torch.manual_seed(7)
        found.append(attack(images, labels))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-14)
    assert (found[0] - images).abs().max() > 0.05


def test_a_targeted_mode_is_minus_cross_entropy_toward_the_targets(small_net, batch):
    net, (images, labels) = small_net(8, train=False), batch(9)
    targets = (labels + 1) % 3
    attack = PGD(net, 0.2, 0.05, 5, "zero")
    by_loss = attack(images, labels, loss=lambda logits: -F.cross_entropy(logits, targets))
    attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 3, quiet=True)
    assert torch.equal(attack(images, labels), by_loss)
    toward = F.cross_entropy(net(by_loss), targets)
    assert toward < F.cross_entropy(net(images), targets)


def test_a_loss_a_sample_is_summed(small_net, batch):
    net, (images, labels) = small_net(10, train=False), batch(11)
    attack = PGD(net, 0.1, 0.03, 4, "zero")
    each = attack(images, labels, loss=lambda logits: F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(
        each, attack(images, labels, loss=lambda logits: F.cross_entropy(logits, labels, reduction="sum"))
    )
    alone = [PGD(net, 0.1, 0.03, 4, "zero")(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
    assert torch.equal(each, torch.cat(alone))


def test_a_loss_of_ones_own_is_what_is_maximised(small_net, batch):
    net, (images, labels) = small_net(12, train=False), batch(13)
    clean = net(images).softmax(1).detach()

    def kl(logits):
        return F.kl_div(logits.log_softmax(1), clean, reduction="batchmean")

    adversarial = PGD(net, 0.1, 0.03, 5, "gaussian")(images, labels, loss=kl)
    by_hand = images + 0.1 * torch.rand(images.shape, dtype=images.dtype).sub(0.5).sign()
    assert kl(net(adversarial)) > 2 * kl(net(by_hand.clamp(0, 1)))
    seen = []
    PGD(net, 0.1, 0.03, 5)(images, labels, loss=lambda logits: seen.append(logits.shape) or kl(logits))
    assert seen == [(4, 3)] * 5


def test_one_step_from_zero_is_fgsm(small_net, batch):
    net, (images, labels) = small_net(14, train=False), batch(15)
    x = images.clone().requires_grad_()
    gradient = torch.autograd.grad(F.cross_entropy(net(x), labels), x)[0]
    expected = (images + 0.02 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(PGD(net, 0.1, 0.02, 1, "zero")(images, labels), expected, rtol=0, atol=1e-15)


def test_starts_have_their_distribution(linear_net):
    net = linear_net(16, channels=1, size=64, dtype=torch.float64)
    images, labels = torch.full((1, 1, 64, 64), 0.5, dtype=torch.float64), torch.tensor([0])
    noise = {}
    for start in STARTS:
        torch.manual_seed(17)
        noise[start] = (PGD(net, 0.2, 1e-12, 1, start)(images, labels) - images).flatten()
    assert noise["zero"].abs().max() < 2e-12
    uniform = noise["uniform"]
    assert 0.199 < uniform.abs().max() <= 0.2
    assert abs(uniform.mean()) < 0.01
    assert uniform.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)
    gaussian = noise["gaussian"]
    assert gaussian.std().item() == pytest.approx(0.001, rel=0.05)
    assert gaussian.abs().max() > 0.0025


@pytest.mark.parametrize("start", STARTS)
def test_it_changes_neither_its_input_nor_the_model(small_net, batch, untouched, start):
    net, (images, labels) = small_net(18, train=False), batch(19)
    before, version = (images.clone(), labels.clone()), images._version
    with untouched(net, but=("torch's random state",)):
        adversarial = PGD(net, 0.1, 0.03, 3, start)(images, labels)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert images._version == version  # nor was it written to with what it held
    assert adversarial.data_ptr() != images.data_ptr()


def test_it_follows_its_model_to_another_device_and_never_waits_for_it(small_net, batch):
    net = small_net(20, dtype=torch.float32)
    attack = PGD(net, 0.1, 0.03, 3)
    net.to("meta")  # a device without values: whatever reads one raises
    images, labels = batch(21, dtype=torch.float32)
    for loss in (None, lambda logits: logits.square().sum(1)):
        assert attack(images, labels, loss=loss).device.type == "meta"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"eps": 8}, ValueError, "did you mean 8/255"),
        ({"eps": 0}, ValueError, r"\(0, 1\]"),
        ({"alpha": 0}, ValueError, r"alpha must lie in \(0, inf\)"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"start": "normal"}, ValueError, "unknown start 'normal'"),
    ],
)
def test_bad_numbers_are_refused(linear_net, options, error, says):
    with pytest.raises(error, match=says):
        PGD(linear_net(), **options)


@pytest.mark.parametrize("start", STARTS)
def test_the_box_is_the_range_of_the_images(linear_net, batch, start):
    net, (images, labels) = linear_net(1, num_classes=2), batch(2, 8, num_classes=2)
    images = 1.2 * images - 0.1
    direction = (net[1].weight[1 - labels] - net[1].weight[labels]).sign().view_as(images)
    attack = PGD(net, 0.3, alpha=0.05, steps=13, start=start, image_range=(-0.1, 1.1))
    best = (images + 0.3 * direction).clamp(-0.1, 1.1)
    assert ((best < 0) | (best > 1)).any()
    assert torch.equal(attack(images, labels), best)


@pytest.mark.parametrize(("limits", "error"), [((1, 0), ValueError), ((0, float("inf")), ValueError), (1.0, TypeError)])
def test_a_range_that_is_none_is_refused(linear_net, limits, error):
    with pytest.raises(error, match="image_range"):
        PGD(linear_net(1, num_classes=2), image_range=limits)
