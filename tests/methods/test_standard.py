"""Standard training is cross-entropy on clean images, and draws nothing."""

import pytest
import torch
from torch.nn import functional as F

from at_extensions.methods import Standard, create_method, list_methods


def test_it_is_cross_entropy_on_the_images_as_they_are(small_net, batch, untouched):
    net, (images, labels) = small_net(1), batch(2)
    net[3].p = 0.0
    with untouched(net, but=("buffers",)):
        step = Standard(net)(images, labels, torch.arange(4))
    assert step.x_adv is images
    net[1].reset_running_stats()
    assert torch.equal(step.loss, F.cross_entropy(net(images), labels))


@pytest.mark.parametrize("name", list_methods())
def test_every_method_takes_a_twin_and_a_seed(small_net, name):
    offered = {"class_counts": [9, 5, 2], "num_samples": 4, "num_classes": 3, "epochs": 4, "tail_weight": 0}
    method = create_method(name, small_net(), offered=offered, twin=False, seed=3)
    assert method.stream.seed == 3
    assert getattr(method, "inner", method)._fresh_twin() is None
