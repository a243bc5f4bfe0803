"""When a flag is raised, in numbers; that models raise them is in ``test_autoattack``."""

import pytest
import torch
from torch import nn

from at_extensions.evaluation import evaluate
from at_extensions.evaluation.flags import inspect, nondeterministic, square_improves, zero_gradients


def test_square_beating_gradients_is_flagged():
    assert square_improves({"apgd-ce": 0.5, "square": 0.49}, 1000).name == "square_improves"
    assert square_improves({"apgd-ce": 0.5, "square": 0.499}, 1000) is None
    assert square_improves({"apgd-ce": 0.5, "square": 0.4, "apgd-t": 0.3}, 1000) is None
    assert square_improves({"square": 0.4}, 1000) is None
    assert square_improves({"apgd-ce": 0.5}, 1000) is None


def test_square_beating_gradients_on_a_single_image_is_not_flagged():
    assert square_improves({"apgd-ce": 0.51, "square": 0.50}, 100) is None
    assert square_improves({"apgd-ce": 0.52, "square": 0.50}, 100).name == "square_improves"


def test_counts_have_a_margin():
    assert zero_gradients(0) is None
    assert zero_gradients(1).name == "zero_gradient"
    assert nondeterministic(2, 1000) is None
    assert nondeterministic(3, 1000).name == "nondeterministic"


def names(model, x, **options):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return [flag.name for flag in inspect(model, x, model(x).argmax(1), **options)]


def test_noise_is_measured_relative_to_the_logits(linear, make_images):
    model, x = linear(4), make_images(16)
    for noise, flagged in ((0.0, False), (1e-6, False), (1e-2, True)):
        noisy = lambda images, noise=noise: (z := 50 * model(images)) + noise * z.norm() * torch.rand_like(z)  # noqa: E731
        assert names(noisy, x) == (["randomized"] if flagged else [])
        assert names(noisy, x, version="rand") == []


def test_saturated_logits_are_told_from_confident_ones(linear, make_images):
    model, x = linear(4), make_images(64)
    assert names(lambda images: 30 * model(images), x) == []
    assert names(lambda images: 3000 * model(images), x) == ["logit_scale"]


def test_gradients_at_inference_are_noticed_however_they_are_taken(linear, make_images):
    model, x = linear(4), make_images(4)

    def by_backward(images):
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            model(images).sum().backward()
        model.zero_grad()
        return model(images)

    def by_function(images):
        torch.autograd.backward(by_graph := model(images.detach().requires_grad_()).sum())
        model.zero_grad()
        return model(images) + 0 * by_graph

    def by_transform(images):
        return model(images + 0 * torch.func.grad(lambda z: model(z).sum())(images))

    def harmless(images):
        with torch.enable_grad():
            return model(images.requires_grad_())

    for wrapped in (by_backward, by_function, by_transform):
        with torch.enable_grad():
            assert "dynamic" in [flag.name for flag in inspect(wrapped, x.clone(), torch.zeros(4, dtype=torch.long))]
    assert names(harmless, x.clone()) == []
    assert names(nn.Sequential(model), x.clone()) == []


class BatchStatistics(nn.Module):
    """BatchNorm without running statistics."""

    def __init__(self, side=6):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()
        )
        self.head = nn.Linear(4 * side * side, 4)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Centred(nn.Module):
    """Subtracts the mean image of the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x - x.mean(0, keepdim=True) + 0.5)


class Pairs(nn.Module):
    """Fails on a single image, as BatchNorm of features does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if len(x) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return self.model(x)


class Fixed(nn.Module):
    """Answers that depend on the size of the batch alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + 0.1 * len(x) * torch.arange(4)


@pytest.mark.parametrize("kind", [BatchStatistics, Centred, Pairs, Fixed])
def test_answers_that_depend_on_the_batch_are_flagged(linear, make_images, kind):
    model = kind() if kind is BatchStatistics else kind(linear(4))
    for n in (1, 2, 3, 16):
        flagged = names(model.eval(), make_images(n)) if kind is not Pairs or n > 1 else ["batch_dependent"]
        assert "batch_dependent" in flagged


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_answers_that_differ_by_rounding_are_not_flagged(net, make_images, n):
    assert names(net().eval(), make_images(n)) == []
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.GELU(), nn.Flatten(), nn.Linear(64 * 36, 4)]
    assert names(nn.Sequential(*layers).eval(), make_images(n)) == []


def test_a_batch_dependent_model_is_not_evaluated_reliably(make_images, label, small_suite):
    model, x = BatchStatistics(), make_images(24, low=0, high=1)
    y = label(model, x)
    report = evaluate(model, x, y, eps=0.01, batch_size=12, version="custom", attacks=["apgd-ce"])
    (flag,) = [flag for flag in report.flags if flag.name == "batch_dependent"]
    assert flag.overestimates
    assert not report.reliable
