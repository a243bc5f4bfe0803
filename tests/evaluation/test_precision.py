"""Arithmetic of an evaluation: slow bf16 is warned of once, and float32 settings are told apart."""

import warnings

import pytest
import torch
from torch import nn

from at_extensions.evaluation import accuracy, evaluate, precision
from at_extensions.evaluation.precision import arithmetic, check_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def slow_bf16(monkeypatch):
    """A CPU without bf16 instructions, not yet warned of."""
    monkeypatch.setattr(precision, "_has_bf16_instructions", lambda: False)
    precision._warn_of_slow_bf16.cache_clear()
    yield
    precision._warn_of_slow_bf16.cache_clear()


def test_slow_bf16_is_warned_of_once(slow_bf16, linear, make_images, label, recwarn):
    model, x = linear(4), make_images(4)
    y = label(model, x)
    warnings.simplefilter("always")
    for _ in range(2):
        evaluate(model, x, y, eps=0.01, version="custom", attacks=["apgd-ce"], precision="bf16")
        accuracy(model, x, y, search="bf16")
    assert len([w for w in recwarn.list if "bfloat16 instructions" in str(w.message)]) == 1


def test_no_warning_where_bf16_is_not_slow(slow_bf16, monkeypatch, recwarn):
    warnings.simplefilter("always")
    check_precision("precision", "fp32", CPU)
    check_precision("precision", "bf16", CUDA)
    monkeypatch.setattr(precision, "_has_bf16_instructions", lambda: True)
    check_precision("precision", "bf16", CPU)
    assert not recwarn.list


@pytest.fixture
def restored():
    """Put torch's settings of float32 precision back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_devices_and_settings_of_float32_differ(restored):
    default = arithmetic(CPU), arithmetic(CUDA)
    assert default[0] != default[1]
    torch.set_float32_matmul_precision("highest")  # the default, set by name
    assert (arithmetic(CPU), arithmetic(CUDA)) == default
    torch.set_float32_matmul_precision("medium")
    assert arithmetic(CPU) != default[0]
    assert arithmetic(CUDA) != default[1]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    assert arithmetic(CUDA) != default[1]
    assert arithmetic(CPU) == default[0]  # no part of its arithmetic


def test_the_state_of_another_arithmetic_is_refused(restored, linear, make_images, label, tmp_path):
    model, x = linear(4), make_images(4)
    arguments = {"eps": 0.01, "version": "custom", "attacks": ["apgd-ce"], "state_dir": tmp_path}
    first = evaluate(model, x, label(model, x), **arguments)
    assert torch.equal(evaluate(model, x, label(model, x), **arguments).robust, first.robust)
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(ValueError, match="differs in arithmetic"):
        evaluate(model, x, label(model, x), **arguments)


class Scaled(nn.Module):
    """An over-confident network: logits of hundreds to tens of thousands."""

    def __init__(self, model, scale):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.scale * self.model(x)


@pytest.mark.parametrize("scale", [300, 3000, 30000])
def test_over_confident_networks_are_as_robust_in_bf16_as_in_fp32(net, make_images, label, scale):
    model, x = Scaled(net(), scale), make_images(60, low=0, high=1)
    y = label(model, x)
    suite = {"eps": 0.03, "version": "custom", "attacks": ["apgd-ce", "apgd-t"]}
    low, full = (evaluate(model, x, y, precision=p, **suite) for p in ("bf16", "fp32"))
    assert torch.equal(low.robust, full.robust)
    assert 0.2 < full.robust_accuracy < 0.8
    assert low.after_attack["apgd-ce"] <= full.after_attack["apgd-ce"]  # bf16 hides no gradient from cross-entropy
    assert low.reliable == full.reliable == (scale == 300)
    assert [flag.name for flag in low.flags] == ([] if scale == 300 else ["logit_scale"])


def test_gradients_that_vanish_in_bf16_alone_are_searched_in_fp32(linear, make_images, label):
    """A step that is flat in bf16 but for a slope that only float32 resolves."""

    class Saturated(linear):
        def forward(self, x):
            logits = super().forward(x)
            return logits if not torch.is_autocast_enabled(x.device.type) else logits.detach() + 0 * x.sum()

    model, x = Saturated(4), make_images(40)
    y = label(model, x)
    suite = {"eps": 0.008, "version": "custom"}
    for attack in ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t"):
        low, full = (evaluate(model, x, y, attacks=[attack], precision=p, **suite) for p in ("bf16", "fp32"))
        assert torch.equal(low.robust, full.robust)
        assert 0 < full.robust_accuracy < 1
