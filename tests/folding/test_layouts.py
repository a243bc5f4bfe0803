"""Models whose weights' gradients are wrong in channels_last on a CPU stay in the usual layout."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from at_extensions.folding import keeps_contiguous, to_channels_last
from at_extensions.models import create_model


@pytest.mark.parametrize(
    ("layer", "keeps"),
    [
        (nn.Conv2d(4, 8, 1, stride=2), True),
        (nn.Conv2d(2, 8, 1, stride=(1, 3)), True),
        (nn.Conv2d(7, 1, 1, stride=2, padding="valid"), True),
        (nn.Conv2d(64, 8, 1, stride=2), False),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv2d(4, 8, 1, stride=2, groups=4), False),
        (nn.Linear(4, 4), False),
    ],
)
def test_layers_that_keep_the_usual_layout(layer, keeps):
    assert keeps_contiguous(layer) == keeps


def test_a_model_with_such_a_layer_stays_as_it_is_and_others_are_converted():
    narrow, wide = create_model("cifar_resnet18", 3, width=4), create_model("cifar_resnet18", 3, width=16)
    assert not to_channels_last(narrow)
    assert to_channels_last(wide)
    for model, layout in ((narrow, torch.contiguous_format), (wide, torch.channels_last)):
        assert all(p.is_contiguous(memory_format=layout) for p in model.parameters() if p.ndim == 4)


TRAINS = """
import torch
from torch.nn import functional as F
from at_extensions.folding import to_channels_last
from at_extensions.methods import PGDAT
from at_extensions.models import create_model

torch.set_num_threads(1)
for width in (2, 3, 4, 6, 7):
    torch.manual_seed(0)
    model = create_model("cifar_resnet18", 10, width=width)
    exact = create_model("cifar_resnet18", 10, width=width).double()
    exact.load_state_dict(model.state_dict())
    layout = torch.channels_last if to_channels_last(model) else torch.contiguous_format
    x, y = torch.rand(16, 3, 32, 32).contiguous(memory_format=layout), torch.arange(16) % 10
    x_adv = PGDAT(model, eps=0.1, alpha=0.1, steps=1, twin=True).perturb(x, y)  # the twin itself is in channels_last
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(exact(x.double()), y).backward()
    for ours, truth in zip(model.parameters(), exact.parameters()):
        assert (ours.grad - truth.grad).norm() <= 1e-3 * truth.grad.norm() + 1e-6
print("trained")
"""


def test_narrow_networks_train_with_the_right_gradients():
    """In a process of its own, which the fault would end."""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", TRAINS], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout.strip()) == (0, "trained"), result.stderr
