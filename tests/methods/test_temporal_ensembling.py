"""Temporal ensembling against the worked example, slow loops in float64, and an interrupted run."""

import math

import pytest
import torch
import torchattacks
from torch import nn
from torch.nn import functional as F

from at_extensions.attacks import PGD
from at_extensions.methods import PGDAT, TRADES, Standard, TemporalEnsembling
from at_extensions.methods.temporal_ensembling import _penalty


class Scripted(nn.Module):
    """Returns the logits that it is told to; its only weight is a constant factor of 1."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.logits = None

    def forward(self, x):
        return self.logits[: len(x)] * self.factor + 0 * x.flatten(1).sum(1, keepdim=True)


def scripted(n=1, k=3, **options):
    model = Scripted()
    method = TemporalEnsembling(PGDAT(model, eps=0.1, alpha=0.05, steps=1, twin=False), n, k, **options)
    return model, method


def visit(model, method, probabilities, index):
    model.logits = torch.tensor(probabilities, dtype=torch.float64).log()
    n = len(probabilities)
    x = torch.full((n, 1, 2, 2), 0.5, dtype=torch.float64)
    return method._update(method.clean_logits(x), torch.tensor(index))


def test_the_worked_example():
    model, method = scripted(start=1, end=1)
    for p in ((0.7, 0.2, 0.1), (0.5, 0.4, 0.1), (0.2, 0.2, 0.6)):
        average = visit(model, method, [p], [0])
    torch.testing.assert_close(method.table[0], torch.tensor([0.1217, 0.0722, 0.0771]), rtol=0, atol=1e-6)
    torch.testing.assert_close(average[0], torch.tensor([0.449077, 0.266421, 0.284502]), rtol=0, atol=1e-6)
    torch.testing.assert_close(method.predictions()[0], average[0])
    logits = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64).log().requires_grad_()
    zhat = torch.tensor([[0.1217, 0.0722, 0.0771]], dtype=torch.float64)
    zhat = zhat / zhat.sum()
    value = _penalty(logits, zhat)
    assert value.item() == pytest.approx(0.0553301, abs=1e-7)
    gradient = torch.autograd.grad(value, logits)[0]
    expected = torch.tensor([[-0.050037, -0.025683, 0.075720]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(89, 0.0), (90, 2.021384), (100, 9.314388), (105, 18.016400), (120, 85.951439), (135, 219.484689), (150, 300.0),
     (180, 300.0)],
)  # fmt: skip
def test_the_ramp_of_the_paper(epoch, expected):
    _, method = scripted(epochs=200)
    assert (method.start, method.end) == (90, 150)
    assert method.ramp(epoch) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 200, "milestones": [100, 150]}, (90, 150)),
        ({"epochs": 40, "milestones": [20, 30]}, (18, 30)),
        ({"epochs": 40, "milestones": [20]}, (18, 30)),
        ({"epochs": 40}, (18, 30)),
        ({"epochs": 1}, (1, 1)),
        ({"epochs": 40, "start": 3}, (3, 30)),
        ({"milestones": [100, 150]}, (90, 150)),
    ],
)
def test_start_and_end_follow_the_schedule(options, expected):
    _, method = scripted(**options)
    assert (method.start, method.end) == expected


def test_the_table_over_epochs_equals_a_slow_loop_with_partial_and_repeating_batches():
    model, method = scripted(5, 3, start=1, end=1)
    generator, truth, visits = torch.Generator().manual_seed(0), {}, [0] * 5
    for _ in range(3):
        for index in ([0, 1, 2], [3, 3, 1], [4]):
            p = torch.rand(len(index), 3, generator=generator, dtype=torch.float64).softmax(1)
            average = visit(model, method, p.tolist(), index)
            for i in set(index):
                rows = [p[j] for j in range(len(index)) if index[j] == i]
                truth[i] = 0.9 * truth.get(i, torch.zeros(3)) + 0.1 * sum(rows) / len(rows)
                visits[i] += 1
            for j, i in enumerate(index):
                torch.testing.assert_close(average[j].double(), truth[i] / truth[i].sum(), rtol=1e-6, atol=1e-7)
    for i, row in truth.items():
        torch.testing.assert_close(method.table[i].double(), row, rtol=1e-6, atol=1e-7)
        assert method.table[i].sum().item() == pytest.approx(1 - 0.9 ** visits[i], abs=1e-6)
    assert method.visits.tolist() == visits


def test_the_first_visit_is_the_prediction_itself():
    model, method = scripted(2, 3, start=1, end=1)
    average = visit(model, method, [(0.7, 0.2, 0.1)], [1])
    torch.testing.assert_close(average[0], torch.tensor([0.7, 0.2, 0.1]))
    assert torch.equal(method.predictions()[0], torch.zeros(3))
    assert torch.isfinite(method.predictions()).all()


def reference(model, x, y, average, weight, *, trades=None):
    """The penalised attack and loss, written out; eval-mode attack, two steps."""
    model.eval()
    p = model(x).detach()

    def inner(logits):
        if trades is None:
            return F.cross_entropy(logits, y)
        return (p.softmax(1) * (p.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()

    moved = x.clone()
    if trades is not None:
        torch.manual_seed(3)
        moved = (x + 0.001 * torch.randn_like(x)).clamp(0, 1)
    for _ in range(2):
        moved = moved.detach().requires_grad_()
        logits = model(moved)
        objective = inner(logits) + weight * (logits.softmax(1) - average).square().mean()
        gradient = torch.autograd.grad(objective, moved)[0]
        moved = (moved + 0.05 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    moved = moved.detach()
    clean, adversarial = model(x), model(moved)
    if trades is None:
        return moved, F.cross_entropy(adversarial, y) + weight * (adversarial.softmax(1) - average).square().mean()
    kl = (clean.softmax(1) * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum(1).mean()
    return moved, F.cross_entropy(clean, y) + trades * kl + weight * (clean.softmax(1) - average).square().mean()


@pytest.mark.parametrize("trades", [None, 3.0])
def test_attack_and_loss_equal_a_slow_reference(small_net, batch, trades):
    model, (x, y) = small_net(train=False), batch(n=5)
    options = {"eps": 0.1, "alpha": 0.05, "steps": 2, "twin": False, "seed": 3}
    base = PGDAT(model, start="zero", **options) if trades is None else TRADES(model, beta=trades, **options)
    method = TemporalEnsembling(base, 9, 3, start=1, end=3, weight=20.0)
    index = torch.tensor([4, 0, 8, 2, 1])
    with torch.no_grad():
        method.table[index] = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    table = method.table.clone().double()
    z = 0.9 * table[index] + 0.1 * model(x).detach().softmax(1)
    average, weight = z / z.sum(1, keepdim=True), 20 * math.exp(-5)
    moved, loss = reference(model, x, y, average, weight, trades=trades)
    step = method(x, y, index)
    torch.testing.assert_close(step.x_adv, moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(step.loss, loss, rtol=1e-6, atol=1e-9)
    ours, truth = (torch.autograd.grad(v, list(model.parameters())) for v in (step.loss, loss))
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert set(step.terms) == ({"ensembling"} if trades is None else {"natural", "kl", "ensembling"})


def test_before_the_start_it_is_the_inner_method(small_net, batch):
    model, (x, y) = small_net(train=False), batch()
    method = TemporalEnsembling(PGDAT(model, eps=0.1, alpha=0.05, steps=2, seed=1), 4, 3, start=2, end=2)
    plain = PGDAT(model, eps=0.1, alpha=0.05, steps=2, seed=1)
    a, b = method(x, y, torch.arange(4)), plain(x, y)
    assert torch.equal(a.x_adv, b.x_adv)
    assert torch.equal(a.loss, b.loss)
    assert not method.table.any()
    method.epoch_end()
    assert method(x, y, torch.arange(4)).terms.keys() == {"ensembling"}
    assert method.table.any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_resumed_in_the_middle_ends_bit_for_bit_equal(small_net, batch, dtype):
    def make():
        model = small_net(dtype=torch.float32)
        method = TemporalEnsembling(PGDAT(model, eps=0.1, alpha=0.05, steps=1), 8, 3, start=2, end=3, table_dtype=dtype)
        return method, torch.optim.SGD(model.parameters(), lr=0.1)

    def epochs(method, optimizer, numbers):
        for epoch in numbers:
            torch.manual_seed(epoch)  # dropout
            for seed, rows in ((0, range(4)), (1, range(4, 8))):
                x, y = batch(seed, dtype=torch.float32)
                step = method(x, y, torch.tensor(list(rows)))
                optimizer.zero_grad()
                step.loss.backward()
                optimizer.step()
            method.epoch_end()

    whole, optimizer = make()
    epochs(whole, optimizer, range(4))
    first, optimizer = make()
    epochs(first, optimizer, range(2))
    resumed, fresh = make()
    resumed.model.load_state_dict(first.model.state_dict())
    resumed.load_memory(first.memory())
    fresh.load_state_dict(optimizer.state_dict())
    epochs(resumed, fresh, range(2, 4))
    assert resumed.epoch == whole.epoch == 5
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_a_half_precision_table_rounds_once_a_visit():
    model, method = scripted(1, 3, start=1, end=1, table_dtype="float16")
    exact = torch.zeros(3, dtype=torch.float64)
    for p in ((0.7, 0.2, 0.1), (0.5, 0.4, 0.1), (0.2, 0.2, 0.6)):
        visit(model, method, [p], [0])
        exact = 0.9 * exact + 0.1 * torch.tensor(p, dtype=torch.float64)
    assert method.table.dtype is torch.float16
    assert (method.table[0].double() - exact).abs().max() <= 3 * 2**-11 * exact.max()


def test_samples_outside_the_table_are_told_and_change_nothing(small_net, batch):
    model, (x, y) = small_net(), batch()
    method = TemporalEnsembling(PGDAT(model, eps=0.1, alpha=0.05, steps=1), 4, 3, start=1, end=1)
    method(x, y, torch.tensor([0, 1, 7, -2]))
    assert method.visits.tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="outside the table of 4 rows"):
        method.epoch_end()


def test_a_step_reads_no_value(small_net, batch, no_host_sync):
    model, (x, y) = small_net(), batch()
    method = TemporalEnsembling(PGDAT(model, eps=0.1, alpha=0.05, steps=1, twin=False), 4, 3, start=1, end=1)
    method(x, y, torch.arange(4))
    with no_host_sync():
        method(x, y, torch.arange(4))


def test_bad_input_is_refused(small_net, batch):
    model, (x, y) = small_net(), batch()
    base = PGDAT(model, eps=0.1, alpha=0.05, steps=1)
    with pytest.raises(ValueError, match="start and end in epochs"):
        TemporalEnsembling(base, 4, 3)
    with pytest.raises(ValueError, match="end must not come before start"):
        TemporalEnsembling(base, 4, 3, start=5, end=4)
    with pytest.raises(ValueError, match="momentum must lie in"):
        TemporalEnsembling(base, 4, 3, epochs=10, momentum=1.0)
    with pytest.raises(ValueError, match="table_dtype"):
        TemporalEnsembling(base, 4, 3, epochs=10, table_dtype="int8")
    with pytest.raises(ValueError, match="attacks with a loss of its own"):
        TemporalEnsembling(PGDAT(model, attack=torchattacks.FGSM(model, 0.1)), 4, 3, epochs=10)
    with pytest.raises((ValueError, TypeError)):
        TemporalEnsembling(Standard(model), 4, 3, epochs=10)
    with pytest.raises(ValueError, match="needs its number"):
        TemporalEnsembling(base, 4, 3, epochs=10)(x, y)
    with pytest.raises(ValueError, match="the table has 5 classes, the model 3"):
        TemporalEnsembling(PGDAT(model, attack=PGD(model, 0.1, 0.05, 1)), 4, 5, start=1, end=1)(x, y, torch.arange(4))
