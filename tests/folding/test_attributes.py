"""A twin follows every change of what a forward pass reads beside tensors: attributes, classes, methods, globals."""

import copy
import dataclasses
import functools
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.folding import TwinWarning, fold_batchnorm, refreshed
from at_extensions.folding.twin import FoldedTwin

SWITCH = False
SETTINGS = types.SimpleNamespace(slope=0.5)


def helper(x):
    return x.tanh()


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    names: tuple = ("a",)


class Unit:
    """An activation that is no module."""

    def __call__(self, x):
        return F.softplus(x)


def outer_slope():
    slope = 0.25

    def act(x):
        return F.leaky_relu(x, slope)

    def change(value):
        nonlocal slope
        slope = value

    return act, change


class Block(nn.Module):
    """A convolution and its BatchNorm, with attributes of every kind between."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.leaky, self.drop = nn.LeakyReLU(0.1), nn.Dropout(0.3)
        self.power, self.kind, self.before = 1.0, "plain", False
        self.window, self.gains, self.table = (0, 3), [1.0, 2.0], {"gain": {"value": 1.0}}
        self.options, self.act, self.partial = Options(), F.relu, functools.partial(F.leaky_relu, negative_slope=0.2)
        self.closed, self.change_closed = outer_slope()
        self.shift, self.tensors = torch.full((1,), 0.5), [torch.ones(1)]
        self.unit = Unit()

    def forward(self, x):
        x = self.conv(x)
        if self.before or SWITCH:
            x = x * 2  # then nothing may fold
        x = self.drop(self.leaky(self.norm(x)))
        x = x**2 * self.power if self.kind == "squared" else x * self.power
        x = x[:, self.window[0] : self.window[1]] * self.gains[0] * self.table["gain"]["value"] * self.options.scale
        x = self.act(x) + self.partial(x) + self.closed(x) + self.shift + self.tensors[0] + self.unit(x)
        return self.extra(helper(x) * SETTINGS.slope)

    def extra(self, x):
        return x


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


class Doubled(Block):
    def forward(self, x):
        return 2 * self.norm(2 * self.conv(x))[:, :3]


def prepared():
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.block.norm.running_var, 0.5, 1.5)
    nn.init.normal_(model.block.norm.running_mean)
    return model.double().eval()


def images():
    return torch.rand(4, 3, 7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def append_gain(block):
    block.gains[0] = 3.0


def nested(block):
    block.table["gain"]["value"] = -1.0


def of_object(block):
    block.options.scale = 4.0


def monkeypatched(block):
    block.extra = lambda x: x - 1


def own_forward(block):
    block.forward = types.MethodType(Doubled.forward, block)


CHANGES = {
    "number of a layer": lambda b: setattr(b.leaky, "negative_slope", 0.9),
    "number": lambda b: setattr(b, "power", 2.5),
    "string": lambda b: setattr(b, "kind", "squared"),
    "flag that decides what folds": lambda b: setattr(b, "before", True),
    "tuple": lambda b: setattr(b, "window", (2, 5)),
    "list in place": append_gain,
    "dictionary in place": nested,
    "object in place": of_object,
    "function": lambda b: setattr(b, "act", F.silu),
    "partial": lambda b: setattr(b, "partial", functools.partial(F.leaky_relu, negative_slope=0.9)),
    "enclosing variable": lambda b: b.change_closed(0.75),
    "tensor": lambda b: setattr(b, "shift", torch.full((1,), -2.0)),
    "tensor in place": lambda b: b.shift.fill_(7.0),
    "tensor in a list": lambda b: b.tensors.__setitem__(0, torch.full((1,), 3.0)),
    "tensor in a list in place": lambda b: b.tensors[0].fill_(5.0),
    "object": lambda b: setattr(b, "unit", torch.sigmoid),
    "eps": lambda b: setattr(b.norm, "eps", 0.3),
    "stride": lambda b: setattr(b.conv, "stride", (2, 2)),
    "dilation": lambda b: setattr(b.conv, "dilation", (2, 2)),
    "method of an instance": monkeypatched,
    "forward of an instance": own_forward,
    "class": lambda b: setattr(b, "__class__", Doubled),
    "class of a layer": lambda b: setattr(b.leaky, "__class__", nn.Identity),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_attribute_is_followed(change):
    model, x = prepared(), images()
    twin = fold_batchnorm(model)
    before = model(x)
    torch.testing.assert_close(twin(x), before, rtol=0, atol=1e-12)
    for _ in range(2):
        change(model.block)
        truth = model(x)
        assert not torch.allclose(truth, before)
        torch.testing.assert_close(twin.refresh()(x), truth, rtol=0, atol=1e-12)


def method_of_a_class(monkeypatch):
    monkeypatch.setattr(Block, "extra", lambda self, x: 3 * x)


def forward_of_a_class(monkeypatch):
    monkeypatch.setattr(Block, "forward", Doubled.forward)


def method_of_an_objects_class(monkeypatch):
    monkeypatch.setattr(Unit, "__call__", lambda self, x: x)


def global_flag(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SWITCH", True)


def global_function(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x: -x)


def attribute_of_a_global(monkeypatch):
    monkeypatch.setattr(SETTINGS, "slope", 0.1)


def function_of_torch(monkeypatch):
    monkeypatch.setattr(F, "softplus", F.silu)


@pytest.mark.parametrize(
    "change",
    [
        *(method_of_a_class, forward_of_a_class, method_of_an_objects_class),
        *(global_flag, global_function, attribute_of_a_global, function_of_torch),
    ],
)
def test_a_change_outside_the_model_is_followed(change, monkeypatch):
    model, x = prepared(), images()
    twin = fold_batchnorm(model)
    before = twin(x)
    with monkeypatch.context() as changing:
        change(changing)
        truth = model(x)
        assert not torch.allclose(truth, before)
        torch.testing.assert_close(twin.refresh()(x), truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(twin.refresh()(x), before, rtol=0, atol=1e-12)


def test_a_refresh_without_a_change_builds_nothing_anew(monkeypatch):
    model = prepared()
    twin = fold_batchnorm(model)
    built = []
    monkeypatch.setattr(FoldedTwin, "_build", lambda self: built.append(self))
    for _ in range(3):
        twin.refresh()
    model.block.leaky.negative_slope = 0.4  # of a layer that decides nothing about folding
    model.block.shift = torch.zeros(1)
    twin.refresh()
    assert not built
    assert twin.network.block.leaky.negative_slope == 0.4


def test_a_model_that_changes_at_every_step_is_searched_on_itself_after_one_warning():
    model = prepared()
    twin = fold_batchnorm(model)
    found = []
    for step in range(6):
        model.block.power += 0.1
        if step == 3:
            with pytest.warns(TwinWarning, match="change at every step"):
                found.append(refreshed(twin))
        else:
            found.append(refreshed(twin))
        torch.testing.assert_close(twin(images()), model(images()), rtol=0, atol=1e-12)
    assert [other is twin for other in found] == [True, True, True, False, False, False]


def test_a_model_that_becomes_untraceable_is_searched_on_itself_after_a_warning():
    model = prepared()
    twin = fold_batchnorm(model)
    model.block.__class__ = type("Asking", (Block,), {"forward": lambda self, x: x if x.sum() > 0 else -x})
    with pytest.warns(TwinWarning, match="cannot follow a change of the model: TraceError"):
        assert refreshed(twin) is None


def test_a_module_that_is_not_registered_is_the_models_own():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.hidden = [nn.Linear(4, 2)]
            self.tail = Tail(self.hidden)

        def forward(self, x):
            return self.tail(self.norm(self.conv(x)).mean((2, 3)))

    class Tail(nn.Module):
        def __init__(self, hidden):
            super().__init__()
            self.hidden = hidden

        def forward(self, x):
            return self.hidden[0](x)

    torch.manual_seed(0)
    model = Hidden().eval()
    twin, x = fold_batchnorm(model), torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        model.hidden[0].weight.mul_(-3)
    torch.testing.assert_close(twin.refresh()(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_copied_twin_follows_its_own_model():
    model, x = prepared(), images()
    twin = copy.deepcopy(fold_batchnorm(model))
    twin.model.block.power = 3.0
    torch.testing.assert_close(twin.refresh()(x), twin.model(x), rtol=0, atol=1e-12)
    assert not torch.allclose(twin(x), model(x))
