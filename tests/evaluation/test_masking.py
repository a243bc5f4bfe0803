"""The checks for masked gradients: no flags for ordinary models, flags for models with masked gradients."""

import pytest
import torch
from torch import nn

from at_extensions.evaluation import evaluate
from at_extensions.evaluation.masking import transfer, unbounded

EPS = {"Linf": 0.008, "L2": 0.12, "L1": 0.2}


class Rippled(nn.Module):
    """A model behind ripples too small to see that turn the gradient of every other pixel round."""

    def __init__(self, model, period=1e-3):
        super().__init__()
        self.model, self.period = model, period

    def forward(self, x):
        phase = x / self.period
        triangle = 2 * (phase - (phase + 0.5).floor()).abs() - 0.5  # slope +2/period or -2/period
        return self.model(x + self.period * triangle)


@pytest.mark.parametrize("norm", EPS)
def test_ordinary_models_raise_no_flags(linear, net, make_images, label, small_suite, norm):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for model in (linear(4), net().eval()):
            x = make_images(32)
            y = label(model, x)
            assert unbounded(model, x, y, norm) is None
            report = evaluate(model, x, y, norm=norm, eps=EPS[norm], version="custom", attacks=["apgd-ce", "apgd-t"])
            assert report.robust.any()
            assert transfer(model, x[report.robust], y[report.robust], norm, EPS[norm]) is None


def test_zero_gradients_are_flagged(linear, make_images, label):
    model = nn.Sequential(linear(4))
    model.forward = lambda x: model[0]((x * 15).round() / 15)
    x = make_images(64)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        y = label(model, x)
        flag = unbounded(model, x, y, "Linf")
    assert flag.name == "gradient_masking"
    assert flag.overestimates


def test_shattered_gradients_are_flagged(linear, make_images, label):
    norm, eps = "Linf", 0.02
    model, x = Rippled(linear(4)), make_images(200)
    y = label(model, x)
    report = evaluate(model, x, y, norm=norm, eps=eps, version="custom", attacks=["apgd-ce"])
    robust = report.robust
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        flag = transfer(model, x[robust][:64], y[robust][:64], norm, eps)
    assert robust.any()
    assert flag is not None
    assert flag.name == "gradient_masking"


def test_no_flag_without_samples(linear):
    x, y = torch.zeros(0, 3, 6, 6), torch.zeros(0, dtype=torch.long)
    assert unbounded(linear(4), x, y, "Linf") is None
    assert transfer(linear(4), x, y, "Linf", 0.1) is None


def test_reports_with_these_flags_are_not_reliable(linear, make_images, label, small_suite):
    model, x = linear(4), make_images(24)
    y = label(model, x)

    class Scaled(nn.Module):
        def forward(self, images):
            return 3000 * model(images)

    scaled = evaluate(Scaled(), x, y, eps=0.02)
    assert "logit_scale" in [flag.name for flag in scaled.flags]
    assert not scaled.reliable

    class Transductive(nn.Module):
        """Answers that depend on the batch, where it has fewer than 20 images."""

        def forward(self, images):
            return model(images) + 5 * images.mean() * torch.arange(4) * (len(images) < 20)

    y = label(Transductive(), x)
    report = evaluate(Transductive(), x, y, eps=0.005, batch_size=20)
    assert "nondeterministic" in [flag.name for flag in report.flags]
    assert not report.reliable
