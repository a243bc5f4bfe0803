"""Weights of other programs' files: containers and prefixes give the network that was saved, the rest is refused."""

import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import at_extensions as atx
from at_extensions.weights import load_weights


class Net(nn.Module):
    """A user's network; its parts are named as some prefixes are."""

    def __init__(self, width=4):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        return self.fc(self.model(x).mean((2, 3)))


def made(seed, width=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(width).eval()


@pytest.fixture
def trained():
    return made(1)


@pytest.fixture
def other():
    return made(2)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def named(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def lightning(net):
    return {"epoch": 3, "state_dict": named("model.", net.state_dict()), "hyper_parameters": {"lr": 0.1}}


def averaged(net):
    raw = made(7).state_dict()
    options = argparse.Namespace(lr=0.1, model="net")  # timm's train.py keeps its options as they are
    return {"epoch": 3, "arch": "net", "state_dict": raw, "args": options, "state_dict_ema": net.state_dict()}


SAVED = {
    "plain": lambda net: net.state_dict(),
    "DataParallel": lambda net: nn.DataParallel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "compiled and parallel": lambda net: {"net": nn.DataParallel(torch.compile(net)).state_dict(), "acc": 93.1},
    "a compiled part": lambda net: {k.replace("model.", "model._orig_mod.", 1): v for k, v in net.state_dict().items()},
    "Lightning": lightning,
    "timm with EMA": averaged,
    "NumPy scalars": lambda net: {"model_state_dict": net.state_dict(), "best": np.float64(0.5), "n": np.int64(3)},
    "nested": lambda net: {"ema": {"decay": 0.9, "shadow": named("network.", net.state_dict())}},
    "deep": lambda net: {"model": {"state_dict": named("module.model.network.", net.state_dict())}},
    "before torch 0.4.1": lambda net: {k: v for k, v in net.state_dict().items() if "num_batches" not in k},
    "wrapped twice": lambda net: (
        named("module.model.", net.state_dict()) | named("module.attacker.model.", net.state_dict())
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.filterwarnings("ignore:.*holds weights under state_dict_ema")
def test_every_kind_of_file_gives_the_network_that_was_saved(kind, trained, other, tmp_path):
    torch.save(SAVED[kind](trained), tmp_path / "weights.pth")
    assert not same(trained.state_dict(), other.state_dict())
    load_weights(other, tmp_path / "weights.pth")
    assert same(other.state_dict(), trained.state_dict())


def test_safetensors_of_a_parallel_network(trained, other, tmp_path):
    save_file(named("module.", trained.state_dict()), tmp_path / "weights.safetensors")
    os.rename(tmp_path / "weights.safetensors", tmp_path / "weights.bin")  # known by its content too
    load_weights(other, tmp_path / "weights.bin")
    assert same(other.state_dict(), trained.state_dict())


def test_a_compiled_or_parallel_model_takes_plain_weights(trained, other, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    load_weights(nn.DataParallel(torch.compile(other)), tmp_path / "weights.pt")
    assert same(other.state_dict(), trained.state_dict())


def test_a_run_of_a_compiled_model_is_opened(tmp_path):
    model = atx.create_model("small_cnn", 4, width=4).eval()
    names = named("_orig_mod.", model.state_dict())  # as runs of compiled models were written before
    recipe = {"recipe": json.dumps(model.recipe)}
    path = atx.runs.save_tensors(tmp_path / "weights.safetensors", names, recipe)
    assert same(atx.load_model(path).state_dict(), model.state_dict())


def test_averaged_weights_come_first_and_the_raw_ones_by_their_key(trained, other, tmp_path):
    torch.save(averaged(trained), tmp_path / "weights.pth.tar")
    with pytest.warns(UserWarning, match="state_dict_ema was taken, and key='state_dict' .--weights-key"):
        assert load_weights(other, tmp_path / "weights.pth.tar").container == "state_dict_ema"
    assert load_weights(other, tmp_path / "weights.pth.tar", key="state_dict").container == "state_dict"
    assert same(other.state_dict(), made(7).state_dict())
    with pytest.raises(ValueError, match="no weights under 'swa'; it holds the keys epoch, arch, state_dict"):
        load_weights(other, tmp_path / "weights.pth.tar", key="swa")


def test_two_networks_in_one_file_are_not_chosen_between(untouched, trained, other, tmp_path):
    both = named("student.", trained.state_dict()) | named("teacher.", made(3).state_dict())
    torch.save(both, tmp_path / "weights.pt")
    with (
        untouched(other),
        pytest.raises(ValueError, match="more than once, under student and teacher; choose"),
    ):
        load_weights(other, tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt", key="student")
    assert same(other.state_dict(), trained.state_dict())


def test_tensors_of_something_else_are_named(trained, other, tmp_path):
    torch.save(
        {"state_dict": named("model.", trained.state_dict()) | {"loss.weight": torch.ones(5)}}, tmp_path / "w.ckpt"
    )
    with pytest.warns(UserWarning, match=r"1 not used \(loss\.weight\)"):
        found = load_weights(other, tmp_path / "w.ckpt")
    assert (found.prefix, found.unused) == ("model.", ("loss.weight",))
    assert same(other.state_dict(), trained.state_dict())


def test_a_normalisation_in_the_file_is_not_dropped(untouched, tmp_path):
    plain = atx.create_model("small_cnn", 4, width=4)
    file = named("1.", plain.network.state_dict())
    file |= {"0.mean": torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), "0.std": torch.tensor([0.25, 0.25, 0.25])}
    torch.save(file, tmp_path / "w.pt")
    other = atx.create_model("small_cnn", 4, width=4)
    with untouched(other), pytest.raises(ValueError, match=r"0\.mean = \[0\.5, 0\.4, 0\.3\].*--mean and --std"):
        load_weights(other, tmp_path / "w.pt")
    fitting = atx.create_model("small_cnn", 4, width=4, mean=[0.5, 0.4, 0.3], std=[0.25] * 3)
    load_weights(fitting, tmp_path / "w.pt")
    assert same(fitting.network.state_dict(), plain.network.state_dict())
    assert fitting.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: made(1, width=8).state_dict(),
            r"model\.0\.weight: \(8, 3, 3, 3\) in the file, \(4, 3, 3, 3\)",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, r"tensors 1 missing \(fc\.bias\)"),
        (lambda s: s | {"head.weight": torch.zeros(1)}, r"1 unknown \(head\.weight\)"),
        (lambda s: named("module.", {k: v for k, v in s.items() if k != "fc.bias"}), r"tensors 1 missing \(fc\.bias\)"),
        (lambda s: named("model.", {**s, "extra": s["fc.bias"]}), r"1 unknown \(model\.extra\)"),
        (lambda s: s | {"fc.bias": torch.zeros(5, dtype=torch.int8)}, "1 of another shape"),
        (lambda s: {"a": torch.zeros(1)}, r"missing .*, 1 unknown \(a\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_changes(untouched, trained, other, tmp_path, change, message):
    torch.save(change(trained.state_dict()), tmp_path / "weights.pt")
    with untouched(other), pytest.raises(ValueError, match="another architecture.*" + message):
        load_weights(other, tmp_path / "weights.pt")


def test_files_without_weights_are_told_apart(other, tmp_path):
    path = tmp_path / "weights.pt"
    for content, message in (([torch.zeros(1)], "holds no state dict, but a list"), ({"epoch": 3}, "the keys epoch")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_weights(other, path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is damaged, or no weights file"):
        load_weights(other, path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_weights(other, tmp_path / "none.pt")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_code_are_refused(other, tmp_path, legacy):
    bomb = Bomb(str(tmp_path / "ran"))
    content = {"state_dict": other.state_dict(), "extra": bomb}
    torch.save(content, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(bomb))
    for name in ("weights.pt", "bare.pt"):
        with pytest.raises(ValueError, match=r"holds more than tensors: it pickles .*(posix|nt)\.mkdir"):
            load_weights(other, tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_whole_models_say_how_to_save_their_weights(other, trained, tmp_path):
    torch.save(trained, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"Net.*torch\.save\(model\.state_dict\(\), 'weights\.pt'\)"):
        load_weights(other, tmp_path / "model.pt")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_archives_say_how_to_save_their_weights(other, tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.rand(1, 3)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"TorchScript archive.*state_dict"):
        load_weights(other, tmp_path / "model.pt")
