"""REAT against slow loops written from its formulas, and what its two attack weightings do to a sign attack."""

import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchattacks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from at_extensions.attacks import NFGSM
from at_extensions.data import frequency_groups, long_tail_counts
from at_extensions.methods import PGDAT, REAT, create_method, reat
from at_extensions.methods.reat import effective_number_weights, tail_loss

COUNTS = [40, 20, 10, 5]  # by REAT's rule the tail is class 3
LOG_COUNTS = torch.tensor(COUNTS, dtype=torch.float64).log()


def make(net, **options):
    return REAT(net, options.pop("class_counts", COUNTS), **({"eps": 0.1, "alpha": 0.03, "steps": 3} | options))


def slow_weights(n, m):
    weights = []
    for n_c, m_c in zip(n, m):
        beta = (n_c - 1) / n_c
        weights.append(1 / ((1 - beta**m_c) / (1 - beta) + 1e-5))
    return [len(n) * w / sum(weights) for w in weights]


def slow_tail(features, labels, counts, tail, variant):
    """TAIL by loops over samples, pairs and feature dimensions."""
    total, size, dimensions = sum(counts), len(labels), features.shape[1]
    anchors = [i for i in range(size) if labels[i] in tail]
    result = torch.zeros((), dtype=torch.float64)
    for i in anchors:
        q = features[i].detach().softmax(0)
        signed, divergences = [], []
        for j in range(size):
            sign = -1 if labels[i] == labels[j] else 1
            signed.append(sign * (math.sqrt(total / counts[labels[i]]) + math.sqrt(total / counts[labels[j]])))
            p = features[j].softmax(0)
            divergences.append(sum(q[d] * (q[d].log() - p[d].log()) for d in range(dimensions)))
        if variant == "released":
            term = sum(divergences) / (size * dimensions) * sum(signed) / size
        else:
            bounded = [kl.clamp(max=1.0) if s < 0 else kl for s, kl in zip(signed, divergences)]
            term = sum(s * kl for s, kl in zip(signed, bounded)) / size
        result = result + term / len(anchors)
    return result


def rarity_and_tail(counts):
    tail = torch.zeros(len(counts), dtype=torch.bool)
    for c in frequency_groups(counts)["tail"]:
        tail[c] = True
    return (sum(counts) / torch.tensor(counts, dtype=torch.float64)).sqrt(), tail


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(2, 5000), st.integers(0, 5000)), min_size=2, max_size=12))
def test_weights_are_the_formula_s(pairs):
    n, m = zip(*pairs)
    found = effective_number_weights(torch.tensor(n), torch.tensor(m))
    torch.testing.assert_close(found, torch.tensor(slow_weights(n, m), dtype=torch.float64), rtol=1e-8, atol=0)
    assert found.sum() == pytest.approx(len(n))


def test_weights_of_a_class_of_one_image_and_of_one_never_predicted(small_net):
    n, m = torch.tensor([100, 1, 1]), torch.tensor([50, 1, 0])
    effective = [100 * (1 - 0.99**50), 1.0, 0.0]  # beta = 0 for one image; 0^0 = 1
    raw = torch.tensor([1 / (e + 1e-5) for e in effective], dtype=torch.float64)
    torch.testing.assert_close(effective_number_weights(n, m), 3 * raw / raw.sum(), rtol=1e-10, atol=0)
    weights = {}
    for variant in ("released", "pairwise"):
        method = make(small_net(num_classes=4), variant=variant)
        method.predicted.copy_(torch.tensor([30, 20, 10, 0]))
        method.epoch_end()
        weights[variant] = method.class_weights
    expected = {"released": slow_weights(COUNTS, [30, 20, 10, 0]), "pairwise": slow_weights(COUNTS, [30, 20, 10, 1])}
    for variant, values in expected.items():
        torch.testing.assert_close(weights[variant], torch.tensor(values, dtype=torch.float64), rtol=1e-10, atol=0)
    assert weights["released"][3] > 3.99


@pytest.mark.parametrize("variant", ["released", "pairwise"])
@pytest.mark.parametrize("scale", [0.3, 4.0])  # KL within a class below, and above, the bound
@pytest.mark.parametrize("seed", [0, 1])
def test_tail_is_the_slow_loop_s_in_value_and_gradient(variant, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    counts = [30, 5, 100, 60, 4, 10, 7]  # not in order: places 5 and 6 are classes 1 and 4
    labels = torch.randint(7, (12,), generator=generator)
    labels[:4] = torch.tensor([4, 1, 4, 1])
    features = scale * torch.randn(12, 6, generator=generator, dtype=torch.float64)
    ours, theirs = (features.clone().requires_grad_() for _ in range(2))
    rarity, tail = rarity_and_tail(counts)
    assert tail.nonzero().flatten().tolist() == [1, 4]
    found = tail_loss(ours, labels, rarity, tail, variant=variant)
    expected = slow_tail(theirs, labels.tolist(), counts, {1, 4}, variant)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-13)
    assert ours.grad.abs().max() > 1e-4


def test_released_tail_is_what_kldivloss_with_a_stray_option_computes():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 3, 2, 0, 1, 0])
    rarity, tail = rarity_and_tail(COUNTS)
    expected = torch.zeros(8, dtype=torch.float64)
    for i in (1, 3):
        with pytest.warns(UserWarning, match="size_average"):
            mean = nn.KLDivLoss(size_average="none")  # a text counts as true, so it averages over everything
        divergence = mean(features.log_softmax(1), features[i].softmax(0).expand(8, 5))
        signs = torch.where(labels == labels[i], -1.0, 1.0).double()
        expected += divergence * signs * (rarity[labels[i]] + rarity[labels])
    found = tail_loss(features, labels, rarity, tail, variant="released")
    torch.testing.assert_close(found, expected.mean() / 2, rtol=1e-11, atol=0)


def kl(features, i, j):
    return F.kl_div(features[j].log_softmax(0), features[i].softmax(0), reduction="sum")


@pytest.mark.parametrize(("scale", "pushed"), [(0.5, True), (6.0, False)])
def test_pairwise_tail_pulls_other_classes_and_pushes_its_own_up_to_the_bound(scale, pushed):
    rarity, tail = rarity_and_tail(COUNTS)
    features = (scale * torch.eye(3, dtype=torch.float64)).requires_grad_()  # two of the tail class, one of the head
    tail_loss(features, torch.tensor([3, 3, 0]), rarity, tail).backward()
    before = features.detach()
    moved = before - 1e-3 * features.grad
    assert (kl(before, 0, 1) < 1) == pushed
    assert kl(moved, 0, 2) + kl(moved, 1, 2) < kl(before, 0, 2) + kl(before, 1, 2) - 1e-6
    if pushed:
        assert kl(moved, 0, 1) > kl(before, 0, 1) + 1e-6
    else:
        torch.testing.assert_close(moved[:2], before[:2], rtol=0, atol=1e-15)


@pytest.mark.parametrize("variant", ["released", "pairwise"])
def test_tail_keeps_its_precision_in_float32_and_under_bf16_autocast(variant):
    generator = torch.Generator().manual_seed(3)
    exact = 0.1 * torch.rand(64, 128, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (64,), generator=generator)
    rarity, tail = rarity_and_tail(COUNTS)
    expected = tail_loss(exact, labels, rarity, tail, variant=variant)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = tail_loss(exact.float(), labels, rarity.float(), tail, variant=variant)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("variant", ["released", "pairwise"])
def test_a_batch_without_tail_samples_has_no_tail(small_net, batch, variant):
    net, (images, _) = small_net(4, num_classes=4), batch(5)
    net[3].p = 0.0
    labels = torch.tensor([0, 1, 2, 0])
    step = make(net, variant=variant)(images, labels)
    expected = F.cross_entropy(step.logits + LOG_COUNTS, labels)
    torch.testing.assert_close(step.loss, expected, rtol=1e-12, atol=0)
    step.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("variant", ["released", "pairwise"])
@pytest.mark.parametrize("tail_weight", [0.0, 0.5])
def test_a_step_is_one_forward_with_balanced_softmax_and_tail(small_net, batch, untouched, variant, tail_weight):
    net, (images, labels) = small_net(6, num_classes=4), batch(7, 8, num_classes=4)
    labels[:2] = 3
    net[3].p = 0.0
    twin = copy.deepcopy(net)
    method = make(net, variant=variant, tail_weight=tail_weight)
    with untouched(net, but=("buffers",)):
        step = method(images, labels)
    features = twin[:-1](step.x_adv)
    logits = twin[-1](features)
    expected = F.cross_entropy(logits + LOG_COUNTS, labels)
    expected = expected + tail_weight * slow_tail(features, labels.tolist(), COUNTS, {3}, variant)
    torch.testing.assert_close(step.logits, logits, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.loss, expected, rtol=1e-11, atol=0)
    assert net[1].num_batches_tracked == 1
    step.loss.backward()
    expected.backward()
    for ours, theirs in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11)
    assert torch.equal(method.predicted, torch.bincount(logits.argmax(1), minlength=4))


@pytest.mark.parametrize("twin", [True, False])
def test_weights_on_the_loss_leave_a_sign_attack_as_it_is_and_weights_on_the_logits_do_not(small_net, batch, twin):
    images, labels = batch(8, 32, num_classes=4)
    plain = PGDAT(small_net(9, num_classes=4), eps=0.1, alpha=0.03, steps=3, twin=twin).perturb(images, labels)
    attacked = {}
    for weighting in ("loss", "logit"):
        method = make(small_net(9, num_classes=4), attack_weighting=weighting, twin=twin)
        assert method.class_weights.max() > 3 * method.class_weights.min()
        attacked[weighting] = method.perturb(images, labels)
    assert torch.equal(attacked["loss"], plain)
    assert not torch.equal(attacked["logit"], plain)


def test_the_attack_maximises_the_loss_of_its_weighting(small_net, batch):
    net, (_, labels) = small_net(10, num_classes=4), batch(11, 16, num_classes=4)
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    method = make(net)
    w = method.class_weights
    each = [w[y] * F.cross_entropy(z, y) for z, y in zip(logits, labels)]
    torch.testing.assert_close(method.attack_loss(None, labels)(logits), sum(each) / sum(w[y] for y in labels))
    torch.testing.assert_close(
        make(net, attack_weighting="logit").attack_loss(None, labels)(logits), F.cross_entropy(logits + w.log(), labels)
    )


def test_the_first_epoch_s_weights_take_every_prediction_for_right(small_net):
    expected = torch.tensor(slow_weights(COUNTS, COUNTS), dtype=torch.float64)
    torch.testing.assert_close(make(small_net(num_classes=4)).class_weights, expected, rtol=1e-10, atol=0)


def test_the_epoch_s_predictions_become_weights_and_are_counted_anew(small_net, batch):
    method = make(small_net(12, num_classes=4))
    counted = torch.zeros(4, dtype=torch.long)
    for seed in range(3):
        counted += torch.bincount(method(*batch(seed, num_classes=4)).logits.argmax(1), minlength=4)
    assert torch.equal(method.predicted, counted)
    method.epoch_end()
    assert method.predicted.sum() == 0
    expected = torch.tensor(slow_weights(COUNTS, counted.tolist()), dtype=torch.float64)
    torch.testing.assert_close(method.class_weights, expected, rtol=1e-10, atol=0)


def test_a_state_dict_taken_within_an_epoch_goes_on_as_if_nothing_had_happened(small_net, batch):
    def steps(method, seeds):
        torch.manual_seed(13)
        return [method(*batch(seed, num_classes=4)) for seed in seeds]

    method = make(small_net(14, num_classes=4), attack_weighting="logit")
    steps(method, (1, 2))
    method.epoch_end()
    steps(method, (3,))
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    again = make(small_net(99, num_classes=4), attack_weighting="logit", seed=5)
    again.load_state_dict(torch.load(file, weights_only=True))
    results = []
    for m in (method, again):
        made = steps(m, (4, 5))
        m.epoch_end()
        results.append([*(s.loss for s in made), *(s.x_adv for s in made), m.class_weights])
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)
    assert {"predicted", "class_weights"} <= method.state_dict().keys()


def test_two_processes_end_the_epoch_with_the_joint_counts(tmp_path):
    worker = Path(__file__).with_name("reat_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(worker)]
    environment = {"OMP_NUM_THREADS": "1", "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for state in states:
        assert torch.equal(state["before"], state["counted"])  # its own, not the first process's
        assert state["after"].sum() == 0
        joint = (states[0]["counted"] + states[1]["counted"]).tolist()
        expected = torch.tensor(slow_weights(COUNTS, joint), dtype=torch.float64)
        torch.testing.assert_close(state["class_weights"], expected, rtol=1e-10, atol=0)
    assert not torch.equal(states[0]["counted"], states[1]["counted"])
    assert torch.equal(states[0]["weights"], states[1]["weights"])


@pytest.mark.parametrize("twin", [True, False])
def test_compiled_it_takes_the_same_steps_across_epochs(small_net, batch, twin):
    results = []
    for compiled in (False, True):
        net = small_net(15, num_classes=4)
        net[3].p = 0.0
        method = make(net, variant="pairwise", steps=1, twin=twin)
        if compiled:
            method.compile(backend="aot_eager")
        losses = []
        for seed in range(4):
            step = method(*batch(seed, num_classes=4))
            step.loss.backward()
            losses.append(step.loss.detach())
            if seed % 2:  # an epoch's end: validation runs the model in eval mode, without features
                method.epoch_end()
                net.eval()
                with torch.no_grad():
                    net(batch(seed)[0])
                net.train()
        results.append([*losses, *(p.grad for p in net.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weighting", ["loss", "logit"])
@pytest.mark.parametrize("variant", ["released", "pairwise"])
def test_no_step_after_the_first_reads_the_device(small_net, batch, no_host_sync, weighting, variant, monkeypatch):
    monkeypatch.setattr(torch, "bincount", None)  # on a GPU it reads its largest value on the host
    method = make(small_net(16, num_classes=4), attack_weighting=weighting, variant=variant)
    images, labels = batch(17, num_classes=4)
    method.inspect(images, labels)
    with no_host_sync():
        method(images, labels).loss.backward()


def test_the_attack_leaves_everything_as_it_was(small_net, batch, untouched):
    net = small_net(18, num_classes=4)
    method = make(net, attack_weighting="logit")
    with untouched(net):
        method.perturb(*batch(19, num_classes=4))


def test_float32_and_half_models_keep_their_numbers_in_float32(small_net, batch):
    images, labels = batch(20, num_classes=4)
    for dtype in (torch.float32, torch.bfloat16):
        method = make(small_net(21, num_classes=4, dtype=dtype))
        assert method.class_weights.dtype == torch.float32
        assert torch.isfinite(method(images.to(dtype), labels).loss)


def test_it_is_made_by_name_and_takes_attacks_with_a_loss(small_net, batch):
    offered = {"class_counts": COUNTS, "eps": 0.1, "seed": 3}
    method = create_method("reat", small_net(num_classes=4), offered=offered, variant="pairwise", tail_weight=0.1)
    assert isinstance(method, REAT)
    assert (method.attack.eps, method.variant, method.tail_weight) == (0.1, "pairwise", 0.1)
    assert (REAT(small_net(num_classes=4), COUNTS).variant, method.attack_weighting) == ("released", "loss")
    net = small_net(22, num_classes=4)
    assert torch.isfinite(make(net, attack=NFGSM(net, 0.1))(*batch(23, num_classes=4)).loss)
    with pytest.raises(ValueError, match="REAT attacks with a loss of its own, which PGDL2 does not take"):
        make(net, attack=torchattacks.PGDL2(net))


def test_tails_are_taken_by_rank():
    assert frequency_groups(long_tail_counts(5000, 10, 0.02))["tail"] == [7, 8, 9]
    assert frequency_groups(long_tail_counts(500, 100, 0.02))["tail"] == list(range(67, 100))
    assert frequency_groups([1, 2, 3, 4]) == {"head": [3, 2], "medium": [1], "tail": [0]}
    assert frequency_groups([5, 9]) == {"head": [1], "medium": [], "tail": [0]}
    assert frequency_groups([5, 5, 5])["tail"] == []


def test_classes_without_a_tail_are_said_to_have_none(small_net, batch):
    with pytest.raises(ValueError, match=r"3 classes have no tail by REAT's rule.*use tail_weight=0"):
        make(small_net(), class_counts=[5, 3, 1])
    step = make(small_net(), class_counts=[5, 3, 1], tail_weight=0)(*batch())
    log_counts = torch.tensor([5, 3, 1], dtype=torch.float64).log()
    torch.testing.assert_close(step.loss, F.cross_entropy(step.logits + log_counts, batch()[1]))


class TwoHeads(nn.Module):
    """Its last linear layer is not what makes the logits."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(50, 4), nn.Linear(50, 4)

    def forward(self, x):
        return self.used(x.flatten(1))


def test_unreachable_features_are_said_so(batch):
    images, labels = batch(24, num_classes=4)
    no_linear = nn.Sequential(nn.Conv2d(2, 4, 5), nn.Flatten()).double()
    with pytest.raises(ValueError, match="no single linear classifier"):
        make(no_linear)
    assert torch.isfinite(make(no_linear, tail_weight=0)(images, labels).loss)
    with pytest.raises(ValueError, match="the last linear layer does not make the logits"):
        make(TwoHeads().double())(images, labels)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"class_counts": [4, 3, 2, 0]}, r"class_counts\[3\] must be at least 1, got 0"),
        ({"class_counts": [5, 4, 3, 2, 1]}, "got 5 class_counts for a model of 4 classes"),
        ({"variant": "pairs"}, "unknown variant 'pairs'; did you mean 'pairwise'"),
        ({"attack_weighting": "logits"}, "unknown attack_weighting 'logits'; did you mean 'logit'"),
        ({"tail_weight": -1}, r"tail_weight must lie in \[0, inf\)"),
        ({"eps": 8}, "did you mean 8/255"),
        ({"class_eps": 1}, r"strength must lie in \[0, 1\)"),
    ],
)
def test_bad_options_are_refused(small_net, options, says):
    with pytest.raises(ValueError, match=says):
        make(small_net(num_classes=4), **options)


def test_counts_of_other_classes_are_refused_without_features_too(small_net, batch):
    with pytest.raises(ValueError, match="got 5 class_counts for a model of 4 classes"):
        make(small_net(num_classes=4), class_counts=[5, 4, 3, 2, 1], tail_weight=0)(*batch())


def test_the_bound_on_repulsion_is_the_one_that_is_documented():
    assert reat.LARGEST_REPULSION == 1.0
    assert "counts up to 1 nat" in REAT.__doc__.replace("\n", " ").replace("  ", " ")
