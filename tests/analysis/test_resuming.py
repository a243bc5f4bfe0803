"""Activations stored between layers: only those that later layers need, and never above the limit."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from at_extensions.analysis._recording import CannotRecordError, Recording
from at_extensions.analysis._resets import choose_layers, unique_tensors
from at_extensions.analysis._resuming import Schedule

VALUE = 4 * 2 * 8 * 8 * 8  # bytes of an activation of two images, 8 channels, 8 x 8 pixels


class Chain(nn.Module):
    """Twelve convolutions of one width, each with a residual connection and an activation in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(12))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            out = block(torch.relu(x))
            out += x
            x = out
        return self.head(self.norm(x).relu_().mean((2, 3)))


@pytest.fixture
def chain():
    torch.manual_seed(0)
    return Chain().eval()


def prepare(model, images, limit):
    with torch.no_grad():
        state, layers = unique_tensors(model), choose_layers(model, None)
        return state, layers, Schedule(Recording(model, state, images), [layer.tensors for layer in layers], limit)


def visits(schedule, images):
    """Yield each layer's number and function, and the bytes stored while it is visited."""
    visiting = schedule.over(images)
    for number, run in visiting:
        values = visiting.gi_frame.f_locals["values"]
        given = {t.untyped_storage().data_ptr() for slot, t in values.items() if slot not in schedule._recording.made}
        kept = [v for slot, v in values.items() if slot in schedule._recording.made and isinstance(v, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        yield number, run, sum(size for place, size in storages.items() if place not in given)


def test_little_more_than_one_block_is_stored(chain):
    images = torch.rand(2, 3, 8, 8)
    _, layers, schedule = prepare(chain, images, 2**30)
    with torch.no_grad():
        kept = {layers[number].name: size for number, _, size in visits(schedule, images)}
    assert list(kept) == [layer.name for layer in layers]  # in the order of the forward pass
    assert max(kept.values()) <= 2 * VALUE + 1000
    assert kept["head"] < VALUE


@pytest.mark.parametrize("limit", [0, 1000, VALUE, 2 * VALUE, 10 * VALUE])
def test_the_limit_holds_and_does_not_change_the_logits(chain, limit):
    images, other = torch.rand(2, 3, 8, 8), Chain().state_dict()
    state, layers, schedule = prepare(chain, images, limit)
    with torch.no_grad():
        for number, run, kept in visits(schedule, images):
            weights = {name: other[name] for name in layers[number].tensors}
            assert torch.equal(run(weights), functional_call(chain, state | weights, (images,)))
            if number in schedule.resumed:
                assert kept <= limit
    assert sorted(schedule.resumed + schedule.whole) == list(range(len(layers)))
    assert len(schedule.whole) == {0: 13, 1000: 12, VALUE: 12}.get(limit, 0)


def test_a_repeated_run_gives_the_same_logits(chain):
    """Operations in place never overwrite stored values."""
    images = torch.rand(2, 3, 8, 8)
    state, layers, schedule = prepare(chain, images, 2**30)
    with torch.no_grad():
        for number, run in schedule.over(images):
            weights = {name: state[name] for name in layers[number].tensors}
            assert torch.equal(run(weights), chain(images))
            assert torch.equal(run(weights), chain(images))


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda x: x.mean((2, 3)) + torch.randn(4), "random"),
        (lambda x: x.mean((2, 3)) * (1 if x.sum() > 0 else 2), "traced"),
        (lambda x: torch.ones(len(x), 4).detach().requires_grad_(False), ""),
    ],
)
def test_networks_that_cannot_be_recorded_are_refused_with_the_reason(forward, why):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return forward(self.conv(x))

    net, images = Net(), torch.rand(2, 3, 4, 4)
    with torch.no_grad():
        if why:
            with pytest.raises(CannotRecordError, match=why):
                Recording(net, unique_tensors(net), images)
        else:  # logits that depend on nothing: no layer is visited
            assert prepare(net, images, 2**30)[2].idle == [0]
