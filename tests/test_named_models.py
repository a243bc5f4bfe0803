"""Models opened by name: runs, files, RobustBench ids and architectures give the weights that were saved."""

import pytest
import torch
from torch import nn

import at_extensions as atx
from at_extensions.named_models import open_model
from at_extensions.runs import RunDirectory, save_weights


@pytest.fixture
def trained():
    return atx.create_model("small_cnn", 4, width=4).eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_run_directories_and_weights_files(trained, tmp_path):
    path = save_weights(trained, RunDirectory(tmp_path / "run").weights("best"))
    for name in (tmp_path / "run", path, str(path)):
        opened = open_model(name)
        assert same(opened.model.state_dict(), trained.state_dict())
        assert not opened.model.training
        assert opened.fresh is None


@pytest.mark.parametrize("layout", ["plain", "nested", "module", "network", "safetensors"])
def test_checkpoints_of_an_architecture(layout, tmp_path):
    trained = atx.create_model("resnet10t", 4)
    own, path = trained.state_dict(), tmp_path / "weights.pt"
    if layout == "safetensors":
        path = save_weights(trained, tmp_path / "weights.safetensors")
    elif layout == "nested":
        torch.save({"epoch": 3, "state_dict": own}, path)
    elif layout == "module":
        torch.save({f"module.{k}": v for k, v in own.items()}, path)
    else:
        torch.save(trained.network.state_dict() if layout == "network" else own, path)
    opened = open_model("resnet10t", path, num_classes=4)
    assert same(opened.model.state_dict(), own)
    assert not opened.model.training


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(2, 10)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_robustbench_ids_come_with_a_maker_of_fresh_networks(tmp_path, monkeypatch):
    from robustbench.model_zoo.models import model_dicts

    zoo = next(iter(model_dicts.values()))  # CIFAR-10
    linf = next(entries for threat, entries in zoo.items() if threat.value == "Linf")
    monkeypatch.setitem(linf, "Nobody2026Nothing", {"model": Net, "gdrive_id": "unused"})
    trained = Net()
    (tmp_path / "cifar10" / "Linf").mkdir(parents=True)
    torch.save(trained.state_dict(), tmp_path / "cifar10" / "Linf" / "Nobody2026Nothing.pt")
    opened = open_model("Nobody2026Nothing", folder=tmp_path)
    assert same(opened.model.state_dict(), trained.state_dict())
    images = torch.rand(3, 3, 8, 8)
    result = atx.analysis.layer_criticality(opened.model, images, fresh=opened.fresh, trials=2, progress=False)
    assert result.layers == ["conv", "fc"]
    assert len(set(result.values["fc"])) == 2
    with pytest.raises(ValueError, match="did you mean 'Nobody2026Nothing'"):
        open_model("Nobody2026Nothin", folder=tmp_path)
    with pytest.raises(ValueError, match="unknown threat model"):
        open_model("Nobody2026Nothing", threat_model="Linfinity")


def test_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run directory"):
        open_model("runs/none")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        open_model(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="is it a run directory"):
        open_model(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        open_model("resnt18")
    with pytest.raises(ValueError, match="no pretrained weights"):
        open_model("cifar_resnet18")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        open_model("small_cnn", tmp_path / "none.pt")
