"""The folder that is submitted: what is in it, and what is refused."""

import hashlib
import json
import os
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from at_extensions.evaluation import state_digest
from at_extensions.models import load_model
from at_extensions.publishing import Paper, check_model_info, publish
from at_extensions.publishing.naming import architecture_name
from at_extensions.publishing.submission import public_config

ID = "Sun2023Enhance_CNN-4"


@pytest.fixture
def folder(make_trained, paper, tmp_path):
    return publish(make_trained(), paper, ID, tmp_path / "out")


def test_the_folder_holds_everything(folder):
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        f"{ID}.pt", f"{ID}.safetensors", f"model_info/cifar10/Linf/{ID}.json", "new_model_issue.md", "README.md",
        "SHA256SUMS", "autoattack.log", "config.yaml", "evaluation.json", "zoo_entry.py", "model_zoo/entry.txt",
        "model_zoo/architectures/sun2023enhance_cnn_4.py",
    }  # fmt: skip
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_the_result_is_robustbenchs(folder):
    info = json.loads((folder / "model_info" / "cifar10" / "Linf" / f"{ID}.json").read_text())
    assert check_model_info(info) == {
        "link": "https://example.org/sun", "name": "Enhanced training", "authors": "A. Sun, B. Moon",
        "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10", "venue": "ICML 2023",
        "architecture": "small_cnn (width 4)", "eps": "8/255", "clean_acc": "90.00", "reported": "51.00",
        "autoattack_acc": "50.00", "footnote": "", "unreliable": False,
    }  # fmt: skip


def test_every_file_has_its_checksum(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ", 1)) for line in lines)
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}


@pytest.mark.parametrize(("model", "options"), [("small_cnn", {}), ("wide_resnet_10_1", {})])
def test_robustbenchs_own_loader_reads_the_checkpoint(make_trained, paper, tmp_path, model, options):
    from robustbench.utils import rm_substr_from_state_dict

    run = make_trained(model=model, **options)
    folder = publish(run, paper, ID, tmp_path / "out")
    checkpoint = torch.load(folder / f"{ID}.pt", weights_only=True)
    state = rm_substr_from_state_dict(rm_substr_from_state_dict(checkpoint["state_dict"], "module."), "model.")
    namespace = {"__name__": "architecture"}
    exec((folder / "model_zoo" / "architectures" / "sun2023enhance_cnn_4.py").read_text(), namespace)
    built = namespace["build"]()
    built.load_state_dict(state, strict=True)
    weights = load_file(run.weights())
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    assert (folder / f"{ID}.safetensors").read_bytes() == run.weights().read_bytes()


def test_the_issue_has_every_line_of_the_template(folder):
    text = (folder / "new_model_issue.md").read_text()
    for line in ("[New Model] Sun2023Enhance_CNN-4", "- **Paper Title**: Enhanced training",
                 "- **Paper URL**: https://example.org/sun", "- **Paper authors**: A. Sun, B. Moon", "## Model 1",
                 "- **Architecture**: small_cnn (width 4)", "- **Threat Model**: Linf", "- **eps**: 8/255",
                 "- **Clean accuracy**: 90.00", "- **Robust accuracy**: 50.00", "- **Additional data**: false",
                 "- **Dataset**: cifar10", "- **Venue**: ICML 2023", "- **Checkpoint and code**: (the URL",
                 "robust accuracy after APGD-CE: 70.00%", "robust accuracy: 50.00%"):  # fmt: skip
        assert line in text
    assert re.findall(r"^#+ .*", text, re.MULTILINE) == ["# Paper Information", "# Leaderboard Claim(s)", "## Model 1",
                                                         "# Model Zoo:"]  # fmt: skip
    assert text.count("- [ ]") == 3  # small_cnn is in no zoo; wanting to be there and the licence are the author's word
    assert "NOT READY" not in text


@pytest.mark.parametrize(
    ("model", "options", "name", "included"),
    [("wide_resnet_10_1", {}, "WideResNet-10-1", True), ("cifar_resnet18", {"width": 8}, "ResNet-18 (width 8)", False),
     ("preact_resnet18", {}, "PreActResNet-18", True),
     ("resnet10t", {"drop_rate": 0.1}, "resnet10t (drop_rate 0.1)", True)],
)  # fmt: skip
def test_names_and_ticks_come_from_the_recipe(make_trained, paper, tmp_path, model, options, name, included):
    folder = publish(make_trained(model=model, **options), paper, ID, tmp_path / "out")
    text = (folder / "new_model_issue.md").read_text()
    assert text.count("- [x] I use an architecture that is included") == included
    assert ("`model_zoo/architectures/` of the folder" in text) != included
    assert f"- **Architecture**: {name}\n" in text
    assert json.loads(next(folder.glob("model_info/*/*/*")).read_text())["architecture"] == name
    assert f"\n{name} for cifar10" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("link", "venue", "printed"),
    [("https://arxiv.org/abs/2302.04638", "", "arXiv, Feb 2023"), ("https://example.org/sun", "", "N/A"),
     ("https://arxiv.org/abs/2302.04638", "ICML 2023", "ICML 2023"),
     ("https://arxiv.org/abs/9902.04638", " ", "arXiv, Feb 2099"),
     ("https://arxiv.org/pdf/2113.04638v2", "", "N/A")],
)  # fmt: skip
def test_the_venue_of_unpublished_work_is_robustbenchs(make_trained, tmp_path, link, venue, printed):
    folder = publish(make_trained(), Paper("T", "A", link, venue), ID, tmp_path / "out")
    assert json.loads(next(folder.glob("model_info/*/*/*")).read_text())["venue"] == printed
    assert f"- **Venue**: {printed}\n" in (folder / "new_model_issue.md").read_text()
    assert "N/A" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("license", "front"),
    [("MIT", {"license": "mit"}), ("CC-BY-4.0", {"license": "cc-by-4.0"}),
     ("https://example.org/l.txt", {"license": "other", "license_link": "https://example.org/l.txt"})],
)  # fmt: skip
def test_the_card_has_the_licence(make_trained, tmp_path, license, front):
    folder = publish(make_trained(), Paper("T", "A", "L", license=license), ID, tmp_path / "out")
    text = (folder / "README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1]).items() >= front.items()
    assert f"Licence: {license}." in text
    assert (f"located here: {license}" in (folder / "new_model_issue.md").read_text()) == (license != "MIT")


@pytest.mark.parametrize("license", ["", "MIT\ntags: []", "my own", None])
def test_a_licence_is_an_identifier_or_an_address(license):
    with pytest.raises((ValueError, TypeError), match="license must be"):
        Paper("T", "A", "L", license=license)


@pytest.mark.parametrize(("channels", "images"), [(1, "gray"), (3, "RGB"), (4, "of 4 channels")])
def test_the_card_names_its_folder_and_its_channels(make_trained, paper, tmp_path, channels, images):
    mean = {"mean": [0.5] * channels, "std": [0.25] * channels}
    run = make_trained(in_chans=channels, **mean)
    text = (publish(run, paper, ID, tmp_path / "my folder") / "README.md").read_text()
    assert f"Images are {images} in [0, 1], (B, {channels}, H, W)" in text
    assert "FOLDER" not in text
    assert "at-extensions verify my folder" in text


def test_the_model_card_says_how_it_was_made(folder):
    text = (folder / "README.md").read_text()
    front, body = text.split("---\n")[1:3]
    assert yaml.safe_load(front)["tags"]
    parts = (
        f"# {ID}", "| clean | 90.00 % |", "| after apgd-ce | 70.00 % |", "**50.00 %** (40.00 to 60.00 at 95 %)",
        "10,000 test images, seed 3", f'load_model("{ID}", dataset="cifar10", threat_model="Linf")',
        "epoch 3, the best", "seed: 7", "steps: 10", f"torch {torch.__version__}",
        "class_counts: [5000, 5000",
    )  # fmt: skip
    for part in parts:
        assert part in body
    assert "Not comparable" not in body


def test_no_folder_of_this_machine_is_named(folder, tmp_path):
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"somebody" not in content
            assert str(tmp_path).encode() not in content


def test_paths_are_cut_from_the_configuration():
    config = {"data": {"name": "npz:/home/me/digits.npz", "root": "/home/me"}, "seed": 1}
    assert public_config(config) == {"data": {"name": "npz:digits.npz"}, "seed": 1}
    assert config["data"]["root"] == "/home/me"
    assert public_config({"data": {"name": r"npz:C:\me\digits.npz"}})["data"]["name"] == "npz:digits.npz"
    assert public_config({"data": {"name": "/home/me/digits.npz"}})["data"]["name"] == "digits.npz"
    assert public_config({"data": {"name": "cifar10"}})["data"]["name"] == "cifar10"


def test_what_the_paper_says_cannot_change_the_page(make_trained, tmp_path):
    paper = Paper("T\n# Head <script>", "A\n- [x] B", "https://example.org", "V\n\n```")
    folder = publish(make_trained(), paper, ID, tmp_path / "out")
    for name in ("README.md", "new_model_issue.md"):
        text = (folder / name).read_text()
        assert "T # Head &lt;script&gt;" in text
        assert "<script>" not in text
        assert "\n# Head" not in text
        assert "\n- [x] B" not in text


def test_a_partial_result_is_refused_or_marked(make_trained, paper, tmp_path):
    run = make_trained(report=make_trained.evaluation(n=1000, version="custom", precision="bf16"))
    with pytest.raises(ValueError, match=r"only 1,000 of 10,000 test images.*not standard.*bf16.*--allow-partial"):
        publish(run, paper, ID, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    folder = publish(run, paper, ID, tmp_path / "out", allow_partial=True)
    mark = "only 1,000 of 10,000 test images were attacked"
    info = json.loads((folder / "model_info" / "cifar10" / "Linf" / f"{ID}.json").read_text())
    assert mark in info["footnote"]
    assert mark in (folder / "README.md").read_text()
    assert "NOT READY FOR SUBMISSION" in (folder / "new_model_issue.md").read_text()


def test_data_without_a_leaderboard(make_trained, paper, tmp_path):
    run = make_trained(data="digits")
    with pytest.raises(ValueError, match="no leaderboard of digits"):
        publish(run, paper, ID, tmp_path / "out")
    folder = publish(run, paper, ID, tmp_path / "out", allow_partial=True)
    assert not (folder / "model_zoo" / "entry.txt").exists()
    call = 'timm.create_model("sun2023enhance_cnn_4_digits_linf", pretrained=True)'
    assert call in (folder / "zoo_entry.py").read_text()
    assert call in (folder / "README.md").read_text()


def test_a_file_that_is_called_like_a_data_set_of_robustbench_is_asked_about(make_trained, paper, tmp_path):
    run = make_trained(data="npz:/home/me/cifar10.npz")
    with pytest.raises(ValueError, match=r"a file called cifar10; .*dataset='cifar10'.*is free"):
        publish(run, paper, ID, tmp_path / "out")
    assert publish(run, paper, ID, tmp_path / "out", dataset="cifar10").is_dir()


def test_an_own_data_set_is_called_after_its_file_and_may_have_any_name(make_trained, paper, tmp_path):
    run = make_trained(data="npz:/home/me/my scans.v2.npz")
    with pytest.raises(ValueError, match=r"called my_scans_v2 here; the name of an own one is free \(--dataset NAME\)"):
        publish(run, paper, ID, tmp_path / "out")
    for dataset, name in ((None, "my_scans_v2"), ("scans", "scans")):
        folder = publish(run, paper, ID, tmp_path / name, dataset=dataset, allow_partial=True)
        assert (folder / "model_info" / name / "Linf" / f"{ID}.json").is_file()


def test_an_unreliable_result_says_so(make_trained, paper, tmp_path):
    flag = {"name": "randomized", "message": "the model answers differently", "overestimates": True}
    run = make_trained(report=make_trained.evaluation(n=10_000, flags=[flag], reliable=False))
    folder = publish(run, paper, ID, tmp_path / "out")
    info = json.loads((folder / "model_info" / "cifar10" / "Linf" / f"{ID}.json").read_text())
    assert info["unreliable"] is True
    assert "- **randomized**: the model answers differently" in (folder / "README.md").read_text()
    assert "warning: randomized" in (folder / "autoattack.log").read_text()


def test_an_old_result_is_refused(make_trained, paper, tmp_path):
    run = make_trained()
    now = (run.path / "evaluation.json").stat().st_mtime_ns
    os.utime(run.weights(), ns=(now, now + 10**9))
    with pytest.raises(ValueError, match=r"older than .* evaluate the run again"):
        publish(run, paper, ID, tmp_path / "out")


def test_a_result_of_other_weights_is_refused(make_trained, paper, tmp_path):
    run = make_trained(report=make_trained.evaluation(n=10_000, weights="0" * 64))
    with pytest.raises(ValueError, match=r"about other weights than .* evaluate the run again"):
        publish(run, paper, ID, tmp_path / "out")
    own = state_digest(load_model(run.weights()))
    run.write_evaluation(make_trained.evaluation(n=10_000, weights=own))
    assert json.loads((publish(run, paper, ID, tmp_path / "out") / "evaluation.json").read_text())["weights"] == own


def test_a_result_on_other_data_is_refused(make_trained, paper, tmp_path):
    run = make_trained(report=make_trained.evaluation(n=10_000, data_name="cifar100"))
    with pytest.raises(ValueError, match="is about cifar100, not cifar10"):
        publish(run, paper, ID, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"robust_accuracy": 0.6}, "robust accuracy 0.6000, 0.5000 by its verdicts"),
     ({"clean": [True] * 9}, "9 clean verdicts for 10000 images")],
)  # fmt: skip
def test_a_result_that_contradicts_itself_is_refused(make_trained, paper, tmp_path, changes, message):
    run = make_trained(report=make_trained.evaluation(n=10_000) | changes)
    with pytest.raises(ValueError, match=message):
        publish(run, paper, ID, tmp_path / "out")


def test_another_eps_than_in_training_is_refused(make_trained, paper, tmp_path):
    run = make_trained(report=make_trained.evaluation(n=10_000, eps=4 / 255))
    with pytest.raises(ValueError, match=r"at eps 4/255, but config.yaml says 0\.03.*--allow-other-eps"):
        publish(run, paper, ID, tmp_path / "out")
    assert publish(run, paper, ID, tmp_path / "out", allow_other_eps=True).is_dir()


def test_an_id_of_robustbenchs_zoo_is_refused(make_trained, paper, tmp_path):
    with pytest.raises(ValueError, match="has Wang2023Better_WRN-28-10 already"):
        publish(make_trained(), paper, "Wang2023Better_WRN_28-10", tmp_path / "out")


def test_wrong_classes_are_refused(make_trained, paper, tmp_path):
    with pytest.raises(ValueError, match="cifar100 has 100 classes, the model 10"):
        publish(make_trained(), paper, ID, tmp_path / "out", dataset="cifar100")


@pytest.mark.parametrize("model_id", ["Sun2023Enhance_v1.5", "../../Sun2023Enhance", "Sun2023Enhance/x"])
def test_bad_ids_leave_nothing_behind(make_trained, paper, tmp_path, model_id):
    run = make_trained()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="a model id is"):
        publish(run, paper, model_id, tmp_path / "out")
    assert set(tmp_path.rglob("*")) == before


def test_an_unevaluated_run_and_a_full_folder_are_refused(make_trained, paper, tmp_path):
    run = make_trained()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        publish(run, paper, ID, tmp_path / "full")
    (run.path / "evaluation.json").write_text(json.dumps({"norm": "Linf"}))
    with pytest.raises(ValueError, match="missing"):
        publish(run, paper, ID, tmp_path / "out")
    (run.path / "evaluation.json").unlink()
    with pytest.raises(FileNotFoundError, match="at-extensions evaluate"):
        publish(run, paper, ID, tmp_path / "out")
    run.weights().unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        publish(run, paper, ID, tmp_path / "out")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_a_failure_leaves_no_half_folder(make_trained, paper, tmp_path, monkeypatch):
    from at_extensions.publishing import submission

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(submission, "checksums", fail)
    with pytest.raises(OSError, match="disk full"):
        publish(make_trained(), paper, ID, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("recipe", "printed"),
    [({"name": "wide_resnet_28_10"}, "WideResNet-28-10"), ({"name": "dm_wide_resnet_70_16"}, "WideResNet-70-16"),
     ({"name": "resnet50"}, "ResNet-50"), ({"name": "preact_resnet18", "width": 64}, "PreActResNet-18"),
     ({"name": "cifar_resnet34", "width": 16, "num_classes": 9}, "ResNet-34 (width 16)"),
     ({"name": "convnext_tiny"}, "convnext_tiny"),
     ({"name": "resnet50d", "drop_rate": 0.25}, "resnet50d (drop_rate 0.25)"),
     ({"name": "Net", "factory": "m:Net", "options": {"depth": 3, "num_classes": 9}}, "Net (depth 3)")],
)  # fmt: skip
def test_printed_names_of_architectures(recipe, printed):
    assert architecture_name(recipe) == printed
