"""Weights of wrapped models are saved and loaded under the model's own names."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from at_extensions.models import create_model, load_model
from at_extensions.runs import load_plain_state_dict, load_tensors, plain_state_dict, save_weights, unwrapped


def compiled(net):
    return torch.compile(net, backend="eager")


class Holder(nn.Module):
    """A model with a part that is called ``module`` and wraps nothing."""

    def __init__(self, inside):
        super().__init__()
        self.module, self.n_averaged = inside, nn.Parameter(torch.zeros(()))


def ema(net):
    from timm.utils import ModelEmaV3

    return ModelEmaV3(net)


WRAPS = {
    "none": lambda net: net,
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "timm ema": ema,
    "thrice": lambda net: nn.DataParallel(AveragedModel(compiled(net))),
}


def a_net(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model("small_cnn", 3, in_chans=1, width=2)


@pytest.mark.parametrize("name", WRAPS)
def test_a_wrapped_model_saves_the_file_of_the_model_itself(tmp_path, name):
    net = a_net()
    save_weights(net, tmp_path / "plain.safetensors")
    save_weights(WRAPS[name](net), tmp_path / "wrapped.safetensors")
    contents = [(tmp_path / f"{kind}.safetensors").read_bytes() for kind in ("plain", "wrapped")]
    assert contents[0] == contents[1]
    assert unwrapped(WRAPS[name](net)).recipe == net.recipe
    assert load_model(tmp_path / "wrapped.safetensors").recipe == net.recipe


@pytest.mark.parametrize("name", WRAPS)
def test_a_wrapped_part_leaves_no_trace_in_names(name):
    net = a_net()
    names = list(plain_state_dict(nn.Sequential(nn.Identity(), net)))
    assert list(plain_state_dict(nn.Sequential(nn.Identity(), WRAPS[name](net)))) == names


def test_a_part_called_module_keeps_its_name(tmp_path):
    holder = Holder(nn.Linear(2, 3))
    save_weights(holder, tmp_path / "w.safetensors")
    assert set(load_tensors(tmp_path / "w.safetensors")[0]) == {"module.weight", "module.bias", "n_averaged"}


@pytest.mark.parametrize("saved", WRAPS)
@pytest.mark.parametrize("loaded", WRAPS)
def test_a_state_goes_from_any_wrapper_into_any_other(saved, loaded):
    one, two = a_net(1), a_net(2)
    target = WRAPS[loaded](two)
    load_plain_state_dict(target, plain_state_dict(WRAPS[saved](one)))
    for name, value in plain_state_dict(target).items():
        assert torch.equal(value, one.state_dict()[name])


def test_a_state_of_another_architecture_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_plain_state_dict(compiled(a_net()), create_model("small_cnn", 4, in_chans=1, width=2).state_dict())
