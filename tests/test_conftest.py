"""The shared proofs can fail: ``untouched`` notices every kind of trace, ``no_host_sync`` every read."""

import random
import sys
import warnings

import numpy as np
import pytest
import torch

TRACES = {
    "weights": lambda net: net[0].weight.data.mul_(1.01),
    "parameter objects": lambda net: setattr(net[0], "weight", torch.nn.Parameter(net[0].weight.detach().clone())),
    "buffers": lambda net: net[1].running_mean.add_(1),
    "gradients": lambda net: setattr(net[0].weight, "grad", torch.zeros_like(net[0].weight)),
    "requires_grad": lambda net: net[0].weight.requires_grad_(False),
    "modes": lambda net: net[3].eval(),
    "attributes": lambda net: setattr(net[1], "track_running_stats", False),
    "hooks": lambda net: net[5].register_forward_hook(lambda *_: None),
    "torch's random state": lambda net: torch.rand(1),
    "NumPy's random state": lambda net: np.random.rand(),  # noqa: NPY002
    "Python's random state": lambda net: random.random(),
    "global switches": lambda net: torch.set_num_threads(2),
    "warning filters": lambda net: warnings.filterwarnings("ignore", message="nothing in particular"),
    "tracer": lambda net: sys.settrace(None),
}


@pytest.mark.parametrize("trace", TRACES)
def test_untouched_notices(untouched, small_net, trace):
    with warnings.catch_warnings():
        with pytest.raises(AssertionError, match=trace), untouched(small_net()) as net:
            TRACES[trace](net)
        torch.set_num_threads(1)


def test_untouched_notices_after_an_exception(untouched, small_net):
    def fail(net):
        net.eval()
        raise KeyError

    with pytest.raises(AssertionError, match="modes"), untouched(small_net()) as net:
        fail(net)


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, float, torch.unique, lambda t: t[t > 0]])
def test_no_host_sync_notices(no_host_sync, read):
    with no_host_sync():
        tensor = torch.ones(1) + 1
        with pytest.raises(AssertionError, match="waits"):
            read(tensor)
