"""The hook: ids that RobustBench and timm take, and its load_model finding a published folder."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from at_extensions.models import load_model
from at_extensions.publishing import publish, register
from at_extensions.publishing.zoo import check_id, entry_name, open_published

GOOD = [
    "Wang2023Better_WRN-28-10",
    "RodriguezMunoz2024Characterizing_Swin-B",
    "Rade2021Helper_R18_ddpm",
    "Singh2023Revisiting_ConvNeXt-T-ConvStem",
    "Augustin2020Adversarial_34_10_extra",
    "Wong2020Fast",
]
BAD = ["Sun2023Enhance_R18.5", "Sun2023Enhance.pt", "../Sun2023Enhance", "a/Sun2023Enhance", "Sun2023Enhance/..", "",
       "Sun2023Enhance\n", "sun2023Enhance", "Sun23Enhance", "Sun2023", "2023Enhance", "Sun2023Enhance__x", "-rf",
       "Sun2023Enhance_", "Sün2023Enhance", "Sun2023Enhance x", "Sun2023Enhance\\x", "Sun2023Enhance\0", None, 3,
       "Sun2023" + "E" * 200]  # fmt: skip


@pytest.mark.parametrize("model_id", GOOD)
def test_ids_of_the_zoo_are_taken(model_id):
    assert check_id(model_id) == model_id


@pytest.mark.parametrize("model_id", BAD)
def test_other_ids_are_refused(model_id):
    with pytest.raises(ValueError, match="a model id is"):
        check_id(model_id)


def test_a_dot_is_explained():
    with pytest.raises(ValueError, match="timm cuts a name at its first dot"):
        check_id("Sun2023Enhance_v1.5")


@pytest.mark.parametrize(("dataset", "threat"), [("cifar.10", "Linf"), ("../cifar10", "Linf"), ("cifar10", "L/2")])
def test_names_beside_the_id_are_checked(dataset, threat):
    with pytest.raises(ValueError, match="plain name"):
        entry_name("Wong2020Fast", dataset, threat)


# RobustBench's loader finds the model by its id; prints what the test compares
ROUND_TRIP = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import at_extensions as atx
from robustbench.utils import load_model

folder, other, images, out = sys.argv[1:]
found = atx.publishing.register(folder)
atx.publishing.register(folder)
x = torch.load(images, weights_only=True)
ask = dict(dataset=found.dataset, threat_model=found.threat_model)
hook = load_model(found.model_id, **ask)
custom = load_model(found.model_id, custom_checkpoint=f"{folder}/{found.model_id}.pt", **ask)
import timm
raised = []
for classes in (7,):
    try:
        timm.create_model(found.entry_name, num_classes=classes)
    except ValueError as error:
        raised.append(str(error))
fresh = timm.create_model(found.entry_name)
second = atx.publishing.register(other)
newer = load_model(second.model_id, **ask)
with torch.no_grad():
    torch.save({"hook": hook(x), "custom": custom(x), "fresh": fresh.eval()(x), "newer": newer(x), "raised": raised,
                "training": hook.training, "same": second.entry_name == found.entry_name}, out)
"""


def run_python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True, **options
    )


def test_robustbench_loads_a_registered_model(make_trained, paper, tmp_path):
    run, retrained = make_trained("run"), make_trained("again", width=6)
    model_id = "Sun2023Enhance_CNN-4"
    first = publish(run, paper, model_id, tmp_path / "first")
    second = publish(retrained, paper, model_id, tmp_path / "second")
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.save(x, tmp_path / "x.pt")
    run_python(ROUND_TRIP, first, second, tmp_path / "x.pt", tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    with torch.no_grad():
        logits, newer = load_model(run.weights())(x), load_model(retrained.weights())(x)
    assert torch.equal(found["hook"], logits)
    assert torch.equal(found["custom"], logits)
    assert torch.equal(found["newer"], newer)
    assert not torch.equal(found["fresh"], logits)
    assert not found["training"]
    assert found["same"]
    assert found["raised"] == ["sun2023enhance_cnn_4_cifar10_linf has 10 classes, not 7"]


def test_a_name_that_timm_has_is_refused(make_trained, paper, tmp_path, monkeypatch):
    import timm

    folder = publish(make_trained(), paper, "Sun2023Taken", tmp_path / "out")
    monkeypatch.setattr(timm, "is_model", lambda name: name == "sun2023taken_cifar10_linf")
    with pytest.raises(ValueError, match="timm has a model called sun2023taken_cifar10_linf"):
        register(folder)


class TestOpening:
    """What register refuses."""

    @pytest.fixture
    def folder(self, make_trained, paper, tmp_path):
        return publish(make_trained(), paper, "Sun2023Enhance", tmp_path / "out")

    @staticmethod
    def result(folder):
        return folder / "model_info" / "cifar10" / "Linf" / "Sun2023Enhance.json"

    def test_no_result(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no published model"):
            open_published(tmp_path)

    def test_two_results(self, folder):
        shutil.copy(self.result(folder), self.result(folder).with_name("Sun2023Other.json"))
        with pytest.raises(FileNotFoundError, match="holds 2 files"):
            open_published(folder)

    def test_no_weights(self, folder):
        (folder / "Sun2023Enhance.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"no Sun2023Enhance\.safetensors"):
            open_published(folder)

    def test_missing_keys(self, folder):
        path = self.result(folder)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eps"}))
        with pytest.raises(ValueError, match="missing: eps"):
            open_published(folder)

    def test_no_json(self, folder):
        self.result(folder).write_text("{")
        with pytest.raises(ValueError, match=r"Sun2023Enhance\.json"):
            open_published(folder)

    def test_another_data_set(self, folder):
        shutil.move(folder / "model_info" / "cifar10", folder / "model_info" / "cifar100")
        with pytest.raises(ValueError, match="says dataset 'cifar10' but lies under 'cifar100'"):
            open_published(folder)

    def test_a_bad_id(self, folder):
        self.result(folder).rename(self.result(folder).with_name("v1.5.json"))
        with pytest.raises(ValueError, match="a model id is"):
            open_published(folder)


READS = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
{hook}
from robustbench.data import get_preprocessing
from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
steps = get_preprocessing(BenchmarkDataset.imagenet, ThreatModel.Linf, "Sun2023Enhance_CNN-4", None)
print(steps.transforms[0].size, steps.transforms[0].interpolation.value, steps.transforms[1].size)
"""


@pytest.mark.parametrize(
    "hook", ["import at_extensions as a; a.publishing.register(sys.argv[1])", "import at_extensions, zoo_entry"]
)
def test_robustbench_reads_imagenet_as_the_evaluation_did(make_trained, paper, tmp_path, hook):
    run = make_trained(report=make_trained.evaluation(n=5000, num_classes=1000), data="imagenet", classes=1000)
    folder = publish(run, paper, "Sun2023Enhance_CNN-4", tmp_path / "out")
    assert "'preprocessing': 'Res256Crop224'" in (folder / "model_zoo" / "entry.txt").read_text()
    command = [sys.executable, "-c", READS.format(hook=hook), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["256", "bilinear", "(224,", "224)"]


def test_a_random_draw_of_imagenet_is_not_ranked(make_trained, paper, tmp_path):
    report = make_trained.evaluation(n=5000, num_classes=1000, indices=list(range(5000)))
    run = make_trained(report=report, data="imagenet", classes=1000)
    with pytest.raises(ValueError, match="5,000 images of its own"):
        publish(run, paper, "Sun2023Enhance_CNN-4", tmp_path / "out")
