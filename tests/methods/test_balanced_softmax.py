"""AT-BSL: plain cross-entropy in the attack, balanced softmax in the loss."""

import copy
import math

import pytest
import torch
import torchattacks

from at_extensions.methods import PGDAT, BalancedSoftmaxAT, create_method

COUNTS = [50, 7, 1]


def make(net, **options):
    return BalancedSoftmaxAT(net, COUNTS, eps=0.1, alpha=0.03, steps=3, **options)


def test_the_loss_is_balanced_softmax_and_the_gradient_its_own(small_net, batch):
    net, (images, labels) = small_net(1), batch(2)
    net[3].p = 0.0
    twin = copy.deepcopy(net)
    step = make(net)(images, labels)
    step.loss.backward()
    logits = twin(step.x_adv)
    expected = 0
    for row, y in zip(logits, labels.tolist()):  # -log(n_y e^{z_y} / sum_c n_c e^{z_c}), sample by sample
        shares = [n * math.e**z for n, z in zip(COUNTS, row)]
        expected = expected - torch.log(shares[y] / sum(shares)) / len(labels)
    expected.backward()
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.logits, logits)
    for ours, theirs in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_the_attack_is_pgd_training_s(small_net, batch):
    images, labels = batch(3)
    plain = PGDAT(small_net(4), eps=0.1, alpha=0.03, steps=3).perturb(images, labels)
    assert torch.equal(make(small_net(4)).perturb(images, labels), plain)


def test_equal_counts_are_pgd_training(small_net, batch):
    images, labels = batch(5)
    losses = []
    for method in (PGDAT(small_net(6), eps=0.1), BalancedSoftmaxAT(small_net(6), [9, 9, 9], eps=0.1)):
        torch.manual_seed(7)
        losses.append(method(images, labels).loss)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


def test_attack_and_step_leave_everything_as_it_was(small_net, batch, untouched, no_host_sync):
    net, (images, labels) = small_net(8), batch(9)
    method = make(net)
    with untouched(net):
        method.perturb(images, labels)
        method.inspect(images, labels)
    with untouched(net, but=("buffers", "torch's random state")), no_host_sync():
        method(images, labels)


def test_it_is_made_by_name_of_offered_counts_and_any_attack(small_net, batch):
    images, labels = batch(10)
    method = create_method("at_bsl", small_net(11), offered={"class_counts": COUNTS, "eps": 0.1}, steps=2)
    assert isinstance(method, BalancedSoftmaxAT)
    assert (method.attack.eps, method.attack.steps) == (0.1, 2)
    net = small_net(11)
    assert torch.isfinite(make(net, attack=torchattacks.PGDL2(net, eps=0.5, steps=2))(images, labels).loss)


@pytest.mark.parametrize("counts", [COUNTS, tuple(COUNTS), torch.tensor(COUNTS)])
def test_counts_come_in_any_sequence(small_net, counts):
    expected = torch.tensor(COUNTS, dtype=torch.float64).log()
    torch.testing.assert_close(BalancedSoftmaxAT(small_net(), counts).log_counts, expected)


@pytest.mark.parametrize(
    ("counts", "error", "says"),
    [
        ([5, 0, 1], ValueError, r"class_counts\[1\] must be at least 1, got 0"),
        ([5], ValueError, "at least 2"),
        ([5, 1.5, 1], TypeError, r"class_counts\[1\] must be a whole number"),
        (None, TypeError, "class_counts must be the training images of each class, got None"),
        (3, TypeError, "class_counts must be the training images of each class, got 3"),
    ],
)
def test_bad_counts_are_refused(small_net, counts, error, says):
    with pytest.raises(error, match=says):
        BalancedSoftmaxAT(small_net(), counts)


def test_counts_of_another_number_of_classes_are_refused(small_net, batch):
    with pytest.raises(ValueError, match="got 4 class_counts for a model of 3 classes"):
        BalancedSoftmaxAT(small_net(), [4, 3, 2, 1])(*batch())
