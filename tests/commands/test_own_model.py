"""A user's own checkpoint: evaluated, published and verified by commands, for every kind of network and file."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from at_extensions.commands.evaluate import evaluate_run
from at_extensions.named_models import open_model
from at_extensions.publishing import Paper, publish, register, verify
from at_extensions.runs import RunDirectory

NET = '''"""A network of mine."""

from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=3):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        return self.fc(self.model(x).flatten(1))


def narrow(num_classes=4):
    return Net(num_classes, width=3)


def words():
    return ["no", "module"]


def probabilities_in_pairs(num_classes):
    net = Net(num_classes)
    net.forward = lambda x: (x, x)
    return net
'''
QUICK = {"eps": 2 / 255, "version": "custom", "attacks": ["apgd-ce"], "device": "cpu", "progress": False}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a network's code, twelve test images that it half knows, and its weights, as the current folder."""
    folder = tmp_path / "project"
    (folder / "nets").mkdir(parents=True)
    (folder / "nets" / "small.py").write_text(NET)
    (folder / "nets" / "__init__.py").write_text("from nets.small import Net, narrow\n")
    namespace = {"__name__": "small"}
    exec(NET, namespace)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = namespace["Net"](4).eval()
    with torch.no_grad():
        net.fc.weight *= 20
        net.fc.bias -= net(images / 255).mean(0)
        labels = (net(images / 255).argmax(1) + (torch.arange(12) % 3 == 2)) % 4  # every third is wrong
    arrays = {"test_images": images.permute(0, 2, 3, 1).numpy(), "test_labels": labels.numpy()}
    np.savez(folder / "scans.npz", **arrays)
    torch.save(net.state_dict(), folder / "weights.pt")
    monkeypatch.chdir(folder)
    yield folder, net
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nets", "small")]:
        del sys.modules[name]


def command(*words, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "at_extensions.cli", *map(str, words)],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=300,
    )  # fmt: skip


def test_the_commands_lead_from_a_checkpoint_to_a_verified_submission(project, tmp_path):
    folder, _ = project
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    data = f"npz:{folder / 'scans.npz'}"
    (folder / "paper.yaml").write_text("title: Mine\nauthors: Me\nlink: https://arxiv.org/abs/2302.00001\n")
    attack = ["--eps", "2/255", "--version", "custom", "--attacks", '["apgd-ce"]', "--device", "cpu"]
    model = ["--model", "nets:Net", "--weights", "weights.pt"]
    done = command("evaluate", "runs/mine", *model, "--data", data, *attack, "--num-classes", "4", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "model: nets.small:Net; weights: weights.pt; normalisation: none" in done.stderr
    run = RunDirectory(folder / "runs" / "mine")
    evaluation = run.evaluation()
    assert evaluation["clean_accuracy"] == pytest.approx(8 / 12)
    assert evaluation["robust_accuracy"] < 8 / 12
    assert (run.path / "report.html").is_file()
    (folder / "nets" / "small.py").unlink()  # from here on the run's own copy serves
    again = command("evaluate", run.path, *attack, cwd=elsewhere)
    assert again.returncode == 0, again.stderr[-3000:]
    assert run.evaluation()["robust"] == evaluation["robust"]
    paper = ["--id", "Me2026Mine_Net", "--paper", folder / "paper.yaml", "--allow-partial"]
    done = command("publish", run.path, *paper, cwd=elsewhere)
    assert done.returncode == 0, done.stderr[-3000:]
    words = next(line for line in done.stdout.splitlines() if line.startswith("next: ")).split()[2:]
    done = command(*words, "--n-examples", "6", "--device", "cpu", cwd=elsewhere)  # as it was printed
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("pass") == 5
    info = json.loads(
        (elsewhere / "Me2026Mine_Net" / "model_info" / "scans" / "Linf" / "Me2026Mine_Net.json").read_text()
    )
    assert (info["architecture"], info["venue"], info["eps"]) == ("Net", "arXiv, Feb 2023", "2/255")
    for path in (elsewhere / "Me2026Mine_Net").rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


def lightning(net, path):
    torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}, "epoch": 1}, path)


FILES = {
    "DataParallel": ("w.pth", lambda net, path: torch.save(nn.DataParallel(net).state_dict(), path)),
    "compiled": ("w.pt", lambda net, path: torch.save({"model": torch.compile(net).state_dict()}, path)),
    "Lightning": ("w.ckpt", lightning),
    "timm with EMA": (
        "w.pth.tar",
        lambda net, path: torch.save({"arch": "net", "state_dict_ema": net.state_dict()}, path),
    ),
    "safetensors": ("w.safetensors", lambda net, path: save_file(net.state_dict(), path)),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_the_same_numbers(project, kind):
    name, save = FILES[kind]
    save(project[1], name)
    report = evaluate_run("run", model="nets.small:Net", weights=name, data="scans.npz", **QUICK)
    assert report.clean_accuracy == pytest.approx(8 / 12)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(open_model("run").model(images), project[1](images))


def test_networks_with_a_name_need_no_code(tmp_path, monkeypatch):
    from at_extensions import create_model

    monkeypatch.chdir(tmp_path)
    net = create_model("small_cnn", 10, in_chans=1, width=2, mean=[0.3], std=[0.5])
    torch.save(net.network.state_dict(), "weights.pt")
    options = {"model": "small_cnn", "model_options": {"width": 2}, "mean": [0.3], "std": [0.5], "data": "digits"}
    evaluate_run("run", weights="weights.pt", n_examples=12, **options, **QUICK)
    config = RunDirectory("run").config()
    assert config["model"] == net.recipe
    assert config["checkpoint"]["file"] == "weights.pt"
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(open_model("run").model(x), net.eval()(x))
    from_ours = evaluate_run("again", weights="run/checkpoints/last.safetensors", data="digits", n_examples=12, **QUICK)
    assert from_ours.robust.tolist() == RunDirectory("run").evaluation()["robust"]


def test_normalisation_is_that_of_the_command(project):
    net = project[1]
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.5, 0.25, 0.5])
    evaluate_run(
        "run", model="nets:Net", weights="weights.pt", data="scans.npz", mean=mean.tolist(), std=std.tolist(), **QUICK
    )
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = net((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(open_model("run").model(x), expected)
    with pytest.raises(ValueError, match=r"mean needs one number a channel \(3\), got 1"):
        evaluate_run("other", model="nets:Net", weights="weights.pt", data="scans.npz", mean=[0.5], **QUICK)


def test_the_same_command_again_goes_on_and_another_one_is_refused(project):
    given = {"model": "nets.small:narrow", "weights": "weights.pt", "data": "scans.npz"}
    first = evaluate_run("run", **given, **QUICK)
    config = (RunDirectory("run").path / "config.yaml").read_text()
    assert evaluate_run("run", **given, **QUICK).robust.tolist() == first.robust.tolist()
    assert (RunDirectory("run").path / "config.yaml").read_text() == config
    torch.save({k: v + 1 for k, v in project[1].state_dict().items()}, "other.pt")
    for change in ({"weights": "other.pt"}, {"model": "nets:Net"}, {"mean": [0.5] * 3}):
        with pytest.raises(FileExistsError, match="holds another model"):
            evaluate_run("run", **(given | change), **QUICK)
    assert (RunDirectory("run").path / "config.yaml").read_text() == config
    with pytest.raises(FileExistsError, match="not an empty directory"):
        evaluate_run("nets", **given, **QUICK)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": None}, ValueError, "say which test data"),
        ({"eps": None}, ValueError, "say the radius of the attack: --eps 8/255"),
        ({"weights": "none.pt"}, FileNotFoundError, r"no checkpoint none\.pt"),
        ({"model": None}, ValueError, r"weights\.pt does not name its network; give --model"),
        ({"model": "nets.small:Nett"}, ValueError, "unknown factory of nets.small 'Nett'; did you mean 'Net'"),
        ({"model": "nest.small:Net"}, ValueError, r"cannot import nest\.small .*No module named 'nest'"),
        ({"model": "nets.small:words"}, TypeError, r"must return a torch\.nn\.Module, got list"),
        ({"model": "nets/none.py:Net"}, ValueError, r"no file nets/none\.py"),
        ({"model_options": {"depth": 3}}, ValueError, "unexpected keyword argument 'depth'.*--model-options"),
        ({"model_options": {"width": 5}}, ValueError, r"model\.0\.weight: \(3, 3, 3, 3\) in the file, \(5, 3"),
        ({"model_options": {"num_classes": 7}, "weights": None}, ValueError, "7 outputs, scans 4 classes.*classes 7"),
        ({"model": "nets.small:probabilities_in_pairs"}, TypeError, "one tensor of logits"),
        ({"model": "resnet18", "weights": None}, ValueError, "for 1000 classes, scans has 4"),
        ({"model": "small_cnn", "weights": None}, ValueError, "no pretrained weights"),
        ({"model": "smal_cnn"}, ValueError, "did you mean 'small_cnn'"),
        ({"data": "gray.npz"}, ValueError, r"fails on images of gray, shape \(2, 1, 8, 8\)"),
    ],
)  # fmt: skip
def test_a_wrong_model_is_told_before_anything_is_written(project, changes, error, message):
    arrays = dict(np.load("scans.npz"))
    np.savez("gray.npz", test_images=arrays["test_images"][..., 0], test_labels=arrays["test_labels"])
    before = set(project[0].rglob("*"))
    given = {"model": "nets.small:Net", "weights": "weights.pt", "data": "scans.npz"} | QUICK | changes
    with pytest.raises(error, match=message):
        evaluate_run("run", **given)
    assert {path for path in project[0].rglob("*") if "__pycache__" not in path.parts} <= before


def test_the_global_random_state_and_search_path_are_as_before(project):
    torch.manual_seed(5)
    before, path = torch.get_rng_state(), list(sys.path)
    evaluate_run("run", model="nets.small:Net", weights="weights.pt", data="scans.npz", **QUICK)
    open_model("run").fresh(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert sys.path == path


def test_fresh_networks_of_a_run_follow_their_seed(project):
    evaluate_run("run", model="nets.small:Net", weights="weights.pt", data="scans.npz", **QUICK)
    fresh = open_model("run").fresh
    weights = [fresh(seed).state_dict()["network.fc.weight"] for seed in (1, 1, 2)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_changed_copy_is_noticed(project):
    evaluate_run("run", model="nets.small:Net", weights="weights.pt", data="scans.npz", **QUICK)
    copy = project[0] / "run" / "source" / "nets" / "small.py"
    copy.write_text(copy.read_text().replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(ValueError, match=r"small\.py is missing or was changed since the evaluation"):
        open_model("run")


def test_two_runs_with_modules_of_one_name_keep_their_own(project):
    evaluate_run("one", model="nets.small:Net", weights="weights.pt", data="scans.npz", **QUICK)
    source = project[0] / "nets" / "small.py"
    source.write_text(source.read_text().replace("nn.ReLU()", "nn.Tanh()"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]
    evaluate_run("two", model="nets/small.py:Net", weights="weights.pt", data="scans.npz", **QUICK)
    kinds = [type(open_model(name).model.network.model[2]) for name in ("one", "two", "one")]
    assert kinds == [nn.ReLU, nn.Tanh, nn.ReLU]


def write_package(folder):
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("WIDTH = 3\n")
    (folder / "parts" / "net.py").write_text("from . import WIDTH\nfrom nets.small import Net\n\n\ndef net():\n"
                                             "    return Net(4, WIDTH)\n")  # fmt: skip


def test_networks_in_several_files_are_evaluated_but_not_shipped(project, tmp_path):
    folder = project[0]
    write_package(folder)
    evaluate_run("run", model="parts.net:net", weights="weights.pt", data="scans.npz", **QUICK)
    copies = {p.relative_to(folder / "run" / "source").as_posix() for p in (folder / "run" / "source").rglob("*.py")}
    assert copies == {"parts/__init__.py", "parts/net.py", "nets/__init__.py", "nets/small.py"}
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(open_model("run").model(x), project[1](x))
    with pytest.raises(ValueError, match=r"in several files .*parts/net\.py.*one file"):
        publish("run", Paper("T", "A", "L"), "Me2026Mine", tmp_path / "out", allow_partial=True)
    assert not (tmp_path / "out").exists()


def test_code_of_a_folder_is_run_only_when_it_is_trusted(project, tmp_path):
    evaluate_run("run", model="nets.small:Net", weights="weights.pt", data="scans.npz", **QUICK)
    folder = publish("run", Paper("T", "A", "L"), "Me2026Mine", tmp_path / "out", allow_partial=True)
    assert (folder / "me2026mine_network.py").read_text() == NET
    assert "- [ ] I use an architecture that is included" in (folder / "new_model_issue.md").read_text()
    with pytest.raises(ValueError, match=r"is code that lies in it; read .*--trust-code"):
        verify(folder, data="scans.npz")
    with pytest.raises(ValueError, match=r"is code in it: read it, then import its zoo_entry\.py"):
        register(folder)
    with pytest.raises(ValueError, match="names no recipe"):
        open_model(folder / "Me2026Mine.safetensors")


def test_a_factory_of_an_installed_package_is_named_and_not_copied(project, monkeypatch):
    site = project[0] / "site"
    site.mkdir()
    (site / "vendor_nets.py").write_text(NET)
    monkeypatch.syspath_prepend(str(site))
    real = sys.modules["at_extensions.factories"].sysconfig.get_path
    monkeypatch.setattr(
        "at_extensions.factories.sysconfig.get_path", lambda kind: str(site) if kind == "purelib" else real(kind)
    )
    evaluate_run("run", model="vendor_nets:Net", weights="weights.pt", data="scans.npz", **QUICK)
    record = yaml.safe_load((project[0] / "run" / "config.yaml").read_text())["model"]
    assert (record["package"], record["factory"]) == ("vendor_nets", "vendor_nets:Net")
    assert not (project[0] / "run" / "source").exists()
    assert type(open_model("run").model.network).__name__ == "Net"
