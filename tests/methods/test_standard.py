"""Standard training is cross-entropy on clean images, and draws nothing."""

import torch
from torch.nn import functional as F

from at_extensions.methods import Standard


def test_it_is_cross_entropy_on_the_images_as_they_are(small_net, batch, untouched):
    net, (images, labels) = small_net(1), batch(2)
    net[3].p = 0.0
    with untouched(net, but=("buffers",)):
        step = Standard(net)(images, labels, torch.arange(4))
    assert step.x_adv is images
    net[1].reset_running_stats()
    assert torch.equal(step.loss, F.cross_entropy(net(images), labels))
