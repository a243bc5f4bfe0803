"""Optimisers and schedules by name."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from at_extensions.training import create_optimizer, create_scheduler


def rates(name, epochs, steps, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = create_scheduler(optimizer, name, epochs=epochs, steps_per_epoch=steps, **options)
    seen = []
    for _ in range(epochs * steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@given(epochs=st.integers(1, 12), steps=st.integers(1, 9), warmup=st.floats(0.05, 0.95))
def test_one_cycle_rises_to_the_peak_once_then_falls_and_never_wastes_a_step(epochs, steps, warmup):
    seen = rates("onecycle", epochs, steps, warmup=warmup)
    top = seen.index(max(seen))
    assert all(0 < rate <= 1 for rate in seen)
    assert seen[: top + 1] == sorted(seen[: top + 1])
    assert seen[top:] == sorted(seen[top:], reverse=True)


def test_one_cycle_reaches_its_peak_at_half_of_the_run():
    seen = rates("onecycle", 10, 10)
    assert seen[49] == pytest.approx(1.0)
    assert seen[24] == pytest.approx(0.5)
    assert seen[-1] == pytest.approx(0.02)


def test_step_divides_by_ten_after_its_milestones():
    seen = rates("step", 4, 3)
    assert seen == pytest.approx([1.0] * 6 + [0.1] * 3 + [0.01] * 3)
    assert rates("step", 4, 2, milestones=[1], gamma=0.5) == pytest.approx([1.0] * 2 + [0.5] * 6)


def test_cosine_follows_its_closed_form_and_constant_stays():
    expected = [(1 + torch.cos(torch.tensor(torch.pi * t / 20)).item()) / 2 for t in range(20)]
    assert rates("cosine", 5, 4) == pytest.approx(expected, abs=1e-6)
    assert rates("constant", 2, 3) == [1.0] * 6


def test_sgd_and_adamw_are_torchs_with_decay_on_every_parameter():
    def trained(make):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        optimizer = make(net)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    torch.testing.assert_close(
        trained(lambda net: create_optimizer(net, "sgd", lr=0.05, momentum=0.8, weight_decay=0.1)),
        trained(lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.8, weight_decay=0.1)),
    )
    torch.testing.assert_close(
        trained(lambda net: create_optimizer(net, "adamw", lr=0.05, weight_decay=0.1)),
        trained(lambda net: torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)),
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("sdg", {"lr": 0.1}, "did you mean 'sgd'"), ("sgd", {"lr": 0.0}, "lr must lie"),
     ("sgd", {"lr": 0.1, "momentum": 1.0}, "momentum must"), ("adamw", {"lr": 0.1, "weight_decay": -1.0}, "weight")],
)  # fmt: skip
def test_bad_optimisers_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(torch.nn.Linear(1, 1), name, **options)


def test_bad_schedules_are_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        create_scheduler(optimizer, "cosin", epochs=1, steps_per_epoch=1)
    with pytest.raises(ValueError, match="warmup must lie"):
        create_scheduler(optimizer, "onecycle", epochs=1, steps_per_epoch=1, warmup=1.0)
