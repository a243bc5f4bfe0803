"""The diffusion diagnostics against what the optimisers really do, and against slow loops."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import at_extensions as atx
from at_extensions.analysis.diffusion import diffusion, effective_lr, gradient_noise, matched_lr
from at_extensions.attacks import PGD
from at_extensions.optim import DEAT


def weight(size=1):
    return nn.Parameter(torch.zeros(size, dtype=torch.float64))


MAKERS = {
    "plain": lambda p, lr=0.1: torch.optim.SGD([p], lr),
    "momentum": lambda p, lr=0.1: torch.optim.SGD([p], lr, momentum=0.9),
    "dampened": lambda p, lr=0.1: torch.optim.SGD([p], lr, momentum=0.8, dampening=0.5),
    "nesterov": lambda p, lr=0.1: torch.optim.SGD([p], lr, momentum=0.7, nesterov=True),
    "deat": lambda p, lr=0.1: DEAT([p], lr),
    "deat, other k1 and k2": lambda p, lr=0.1: DEAT([p], lr, k1=0.3, k2=0.5),
}


def impulse_response(make, steps=400):
    """Displacements after a single gradient of 1, amid zeros (the second one, as torch never dampens the first)."""
    param = weight()
    optimizer = make(param)
    moves = []
    for t in range(steps):
        before = param.detach().clone()
        param.grad = torch.full_like(param, float(t == 1))
        optimizer.step()
        moves.append((param.detach() - before).item())
    return torch.tensor(moves, dtype=torch.float64)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_closed_forms_equal_the_optimisers_impulse_response(make):
    moves = impulse_response(make)
    seen = diffusion(make(weight()), batch_size=50, noise=3.0)
    assert seen.effective_lr == pytest.approx(-moves.sum().item(), rel=1e-10)
    assert seen.one_step_variance == pytest.approx(3 * moves.square().sum().item(), rel=1e-10)
    assert seen.long_run_variance == pytest.approx(3 * moves.sum().item() ** 2, rel=1e-10)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_variances_equal_those_of_displacements_under_white_noise(make):
    size, burn_in, steps, sigma = 8_000, 100, 400, 2.0
    generator = torch.Generator().manual_seed(0)
    param = weight(size)
    optimizer = make(param)
    one_step = []
    for t in range(burn_in + steps):
        if t == burn_in:
            start = param.detach().clone()
        before = param.detach().clone()
        param.grad = sigma * torch.randn(size, dtype=torch.float64, generator=generator)
        optimizer.step()
        if t >= burn_in and t % 50 == 0:
            one_step.append((param.detach() - before).var().item())
    theory = diffusion(optimizer, batch_size=1, noise=sigma**2)
    assert sum(one_step) / len(one_step) == pytest.approx(theory.one_step_variance, rel=0.03)
    assert (param.detach() - start).var().item() / steps == pytest.approx(theory.long_run_variance, rel=0.08)


def test_the_papers_options_give_its_numbers():
    deat = diffusion(DEAT([weight()], lr=0.5), batch_size=128)
    assert deat.effective_lr == pytest.approx(0.5 / math.sqrt(5))
    assert deat.one_step_variance == pytest.approx(0.25 / 9)
    assert deat.long_run_variance == pytest.approx(0.25 / 5)
    assert deat.lr_batch_ratio == pytest.approx(0.5 / 128)
    plain = diffusion(torch.optim.SGD([weight()], lr=0.5), batch_size=128)
    assert plain.one_step_ratio == plain.long_run_ratio == plain.lr_batch_ratio == 0.5 / 128
    heavy = torch.optim.SGD([weight()], lr=0.5, momentum=0.9)
    assert effective_lr(heavy) / deat.effective_lr == pytest.approx(22.36, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(a=st.sampled_from(sorted(MAKERS)), b=st.sampled_from(sorted(MAKERS)), lr=st.floats(1e-4, 10))
def test_matched_optimisers_move_as_far(a, b, lr):
    first, second = weight(), weight()
    optimizer = MAKERS[a](first, lr)
    other = MAKERS[b](second, matched_lr(optimizer, MAKERS[b](second, 123.0)))
    assert effective_lr(other) == pytest.approx(effective_lr(optimizer), rel=1e-12)
    for t in range(200):  # one gradient, then silence
        for param, each in ((first, optimizer), (second, other)):
            param.grad = torch.full_like(param, float(t == 1))
            each.step()
    assert second.item() == pytest.approx(first.item(), rel=1e-7)


def test_ratios_are_the_lr_over_batch_of_plain_sgd_with_that_noise_for_the_same_drift():
    for make in MAKERS.values():
        seen = diffusion(make(weight()), batch_size=10)
        for ratio, variance in (
            (seen.one_step_ratio, seen.one_step_variance),
            (seen.long_run_ratio, seen.long_run_variance),
        ):
            plain = diffusion(torch.optim.SGD([weight()], lr=10 * ratio), batch_size=10)
            noise_per_drift = plain.one_step_variance / plain.effective_lr
            assert noise_per_drift == pytest.approx(variance / seen.effective_lr)


def test_uses_the_present_lr_of_the_given_group():
    optimizer = DEAT([{"params": [weight()]}, {"params": [weight()], "k1": 0.0, "lr": 0.2}], lr=torch.tensor(0.1))
    assert effective_lr(optimizer) == pytest.approx(0.1 / math.sqrt(5))
    assert effective_lr(optimizer, group=1) == pytest.approx(0.2)
    optimizer.param_groups[1]["lr"] = 0.0
    assert effective_lr(optimizer, group=1) == 0
    assert diffusion(optimizer, 8, group=1).long_run_variance == 0


def test_results_print_as_tables_and_convert_to_json():
    seen = diffusion(torch.optim.SGD([weight()], lr=0.1, momentum=0.9), batch_size=128)
    assert json.loads(json.dumps(seen.to_dict()))["optimizer"] == "SGD(lr=0.1, momentum=0.9)"
    assert repr(seen).splitlines()[0] == "Diffusion: SGD(lr=0.1, momentum=0.9), batch 128, lr/b 0.0007813"
    assert repr(seen).splitlines()[1].split() == ["effective", "lr", "1"]
    assert repr(diffusion(DEAT([weight()], 0.1), 128)).startswith("Diffusion: DEAT(lr=0.1, k1=1, k2=0.8), batch 128")
    model, batches = small_model(), batches_for(4)
    noise = gradient_noise(model, batches)
    assert json.loads(json.dumps(noise.to_dict())) == noise.to_dict()
    assert repr(noise).splitlines()[0] == "GradientNoise: 4 batches of 6"


@pytest.mark.parametrize(
    ("optimizer", "group", "error", "message"),
    [
        (lambda: torch.optim.Adam([weight()]), 0, TypeError, "not for Adam"),
        (lambda: torch.optim.SGD([weight()], 0.1, momentum=1.0), 0, ValueError, "must be below 1"),
        (lambda: torch.optim.SGD([weight()], 0.1, momentum=0.5, dampening=1.0), 0, ValueError, "must be below 1"),
        (lambda: DEAT([weight()], 0.1), 1, ValueError, "parameter groups 0 to 0"),
        (lambda: DEAT([weight()], 0.1), -1, ValueError, "parameter groups 0 to"),
    ],
)
def test_optimisers_without_an_effective_lr_are_refused(optimizer, group, error, message):
    fine = DEAT([{"params": [weight()]}, {"params": [weight()]}], 0.1)
    for ask in (
        lambda: effective_lr(optimizer(), group=group),
        lambda: diffusion(optimizer(), 8, group=group),
        lambda: matched_lr(fine, optimizer(), group=group),
    ):
        with pytest.raises(error, match=message):
            ask()


def test_numbers_out_of_range_are_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        diffusion(DEAT([weight()], 0.1), batch_size=0)
    with pytest.raises(ValueError, match="noise must lie in"):
        diffusion(DEAT([weight()], 0.1), batch_size=1, noise=-1.0)


# ---- the noise of a model's gradients


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 4)
        ).double()


def batches_for(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(size, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(size) % 4)
        for _ in range(count)
    ]


def slow_gradients(model, batches, train_batchnorm):
    """One gradient a row, by plain backward."""
    model = model.eval()
    model[1].train(train_batchnorm)
    rows = []
    for images, labels in batches:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


@pytest.mark.parametrize("batchnorm", ["train", "eval"])
def test_gradient_noise_equals_the_trace_of_the_gradients_covariance(batchnorm):
    batches = batches_for(7)
    seen = gradient_noise(small_model(), iter(batches), batchnorm=batchnorm)
    gradients = slow_gradients(small_model(), batches, batchnorm == "train")
    variance = gradients.var(dim=0).sum().item()
    assert seen.variance == pytest.approx(variance, rel=1e-10)
    assert seen.per_sample == pytest.approx(6 * variance, rel=1e-10)
    assert seen.signal == pytest.approx(gradients.mean(0).square().sum().item() - variance / 7, rel=1e-10)
    assert (seen.batch_size, seen.batches) == (6, 7)


def test_gradient_noise_of_adversarial_examples():
    model, batches = small_model(), batches_for(4)
    attack = PGD(model, eps=0.1, alpha=0.05, steps=3, start="zero")
    seen = gradient_noise(model, batches, attack=attack)
    model.eval()
    adversarial = [(attack.forward(x, y), y) for x, y in batches]
    expected = slow_gradients(small_model(), adversarial, train_batchnorm=True).var(dim=0).sum().item()
    assert seen.variance == pytest.approx(expected, rel=1e-10)
    random_starts = [
        gradient_noise(model, batches, attack=PGD(model, eps=0.1, alpha=0.05, steps=1), seed=s).variance
        for s in (0, 0, 1)
    ]
    assert random_starts[0] == random_starts[1] != random_starts[2]


def test_gradient_noise_is_inverse_to_the_batch_size():
    model = small_model()  # without coupling between samples: BatchNorm by running statistics
    small = gradient_noise(model, batches_for(400, size=4), batchnorm="eval")
    large = gradient_noise(model, batches_for(400, size=16, seed=1), batchnorm="eval")
    assert small.per_sample == pytest.approx(large.per_sample, rel=0.15)
    assert small.variance == pytest.approx(4 * large.variance, rel=0.15)


def test_gradient_noise_leaves_the_model_unchanged():
    model = small_model()
    model.train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[5].bias.grad = torch.ones(4, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    gradient_noise(model, batches_for(3), attack=PGD(model, eps=0.1, alpha=0.05, steps=2))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert [p.grad is None for p in model.parameters()] == [True] * 5 + [False]
    assert torch.equal(model[5].bias.grad, torch.ones(4, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_frozen_and_unused_parameters_add_no_noise():
    batches = batches_for(5)
    model = small_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    assert gradient_noise(model, batches).variance == pytest.approx(gradient_noise(small_model(), batches).variance)
    model = small_model()
    for p in model[:5].parameters():
        p.requires_grad_(False)
    head_only = slow_gradients(small_model(), batches, train_batchnorm=True)[:, -(48 * 4 + 4) :]
    assert gradient_noise(model, batches).variance == pytest.approx(head_only.var(dim=0).sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (batches_for(1), ValueError, "at least two batches, got 1"),
        ([], ValueError, "at least two batches, got 0"),
        ([*batches_for(1), *batches_for(1, size=3)], ValueError, "one size, got 6 and 3"),
        ([(2 * x, y) for x, y in batches_for(2)], ValueError, r"must lie in \[0, 1\]"),
        ([(x, y.double()) for x, y in batches_for(2)], TypeError, "class numbers"),
    ],
)
def test_unsuitable_batches_are_refused(batches, error, message):
    with pytest.raises(error, match=message):
        gradient_noise(small_model(), batches)


def test_unsuitable_models_and_attacks_are_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        gradient_noise(F.relu, batches_for(2))
    with pytest.raises(ValueError, match="another model"):
        gradient_noise(small_model(), batches_for(2), attack=PGD(small_model()))
    with pytest.raises(ValueError, match="no parameter"):
        gradient_noise(small_model().requires_grad_(False), batches_for(2))


def test_module_and_package_offer_the_same_functions():
    assert atx.analysis.diffusion.matched_lr is atx.analysis.matched_lr is matched_lr
    assert atx.analysis.diffusion.diffusion is diffusion
