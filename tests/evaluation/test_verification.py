"""Adversarial examples count within the ball and the box, up to rounding."""

import pytest
import torch

from at_extensions.evaluation.verification import fooled

EPS = {"Linf": 0.02, "L2": 0.12, "L1": 0.2}


@pytest.mark.parametrize("norm", EPS)
def test_only_examples_within_ball_and_box_count(linear, make_images, norm):
    model, x, eps = linear(4), make_images(6), EPS[norm]
    y = torch.zeros(6, dtype=torch.long)
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    step = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    step /= torch.linalg.vector_norm(step.flatten(1), ord=order, dim=1)[:, None, None, None]
    with torch.no_grad():
        for size, reached in ((0.0, True), (0.99 * eps, True), (eps, True), (1.001 * eps, False)):
            x_adv = x + size * step
            expected = (model(x_adv).argmax(1) != y) & reached
            assert torch.equal(fooled(model, x, y, x_adv, norm, eps)[0], expected)
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] = 1.0001
        assert not fooled(model, x, y, x_adv, norm, 1.0)[0].any()
