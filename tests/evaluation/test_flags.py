"""When a flag is raised, in numbers; that models raise them is in ``test_autoattack``."""

import torch
from torch import nn

from at_extensions.evaluation.flags import inspect, nondeterministic, square_improves, zero_gradients


def test_square_beating_gradients_is_flagged():
    assert square_improves({"apgd-ce": 0.5, "square": 0.49}, 1000).name == "square_improves"
    assert square_improves({"apgd-ce": 0.5, "square": 0.499}, 1000) is None
    assert square_improves({"apgd-ce": 0.5, "square": 0.4, "apgd-t": 0.3}, 1000) is None
    assert square_improves({"square": 0.4}, 1000) is None
    assert square_improves({"apgd-ce": 0.5}, 1000) is None


def test_square_beating_gradients_on_a_single_image_shows_nothing():
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
