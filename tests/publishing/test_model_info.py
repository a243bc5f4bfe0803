"""RobustBench's JSON of a result."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from at_extensions.checks import parse_fraction
from at_extensions.publishing import Paper, check_model_info, eps_fraction, model_info, write_model_info

PAPER = Paper("Better Diffusion Models", "Zekai Wang, Tianyu Pang", "https://arxiv.org/abs/2302.04638", "ICML 2023")
# the leaderboard's own entry for Wang2023Better_WRN-28-10
PUBLISHED = {
    "link": "https://arxiv.org/abs/2302.04638",
    "name": "Better Diffusion Models Further Improve Adversarial Training",
    "authors": "Zekai Wang, Tianyu Pang, Chao Du, Min Lin, Weiwei Liu, Shuicheng Yan",
    "additional_data": False,
    "number_forward_passes": 1,
    "dataset": "cifar10",
    "venue": "ICML 2023",
    "architecture": "WideResNet-28-10",
    "eps": "8/255",
    "clean_acc": "92.44",
    "reported": "67.31",
    "autoattack_acc": "67.31",
    "footnote": "It uses additional 20M synthetic images in training.",
    "unreliable": False,
}
REPORT = {"norm": "Linf", "eps": 8 / 255, "clean_accuracy": 0.9244, "robust_accuracy": 0.6731, "reliable": True}


def info(**changes):
    return model_info(REPORT | changes, PAPER, dataset="cifar10", architecture="WideResNet-28-10")


def test_writes_what_the_leaderboard_writes():
    paper = Paper(PUBLISHED["name"], PUBLISHED["authors"], PUBLISHED["link"], "ICML 2023", 0.6731, False,
                  PUBLISHED["footnote"])  # fmt: skip
    ours = model_info(REPORT, paper, dataset="cifar10", architecture="WideResNet-28-10")
    assert ours == PUBLISHED
    assert list(ours) == list(PUBLISHED)
    assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in PUBLISHED.items()}


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "Linf", "8/255"),
        (4 / 255, "Linf", "4/255"),
        (0.0313725508749485, "Linf", "8/255"),  # through single precision
        (0.031, "Linf", "0.031"),
        (0.2, "Linf", "0.2"),  # though it is 51/255 too
        (1, "Linf", "1"),
        (0.5, "L2", "0.5"),
        (128 / 255, "L2", "128/255"),
        (12.0, "L1", "12"),
        (1e-4, "Linf", "0.0001"),
    ],
)
def test_eps_as_leaderboards_write_it(eps, norm, text):
    assert eps_fraction(eps, norm) == text


@given(st.floats(1e-4, 1.0))
def test_eps_reads_back(eps):
    assert parse_fraction(eps_fraction(eps)) == pytest.approx(eps, rel=1e-4)


@given(st.integers(0, 10_000))
def test_accuracy_is_exact_to_one_image_in_ten_thousand(right):
    assert float(info(clean_accuracy=right / 10_000)["clean_acc"]) == pytest.approx(right / 100, abs=1e-9)


def test_accuracies_keep_two_decimals():
    assert info(clean_accuracy=0.9, robust_accuracy=0.0)["clean_acc"] == "90.00"
    assert info(clean_accuracy=0.9, robust_accuracy=0.0)["autoattack_acc"] == "0.00"


def test_an_unreliable_result_says_so():
    assert info(reliable=False)["unreliable"] is True


@pytest.mark.parametrize("key", [k for k in PUBLISHED if k not in ("footnote", "unreliable")])
def test_every_missing_key_is_named(key):
    with pytest.raises(ValueError, match=f"missing: {key}"):
        check_model_info({k: v for k, v in PUBLISHED.items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clean_acc", 92.44),
        ("clean_acc", "0.924"),
        ("clean_acc", "92.4"),
        ("clean_acc", "192.44"),
        ("autoattack_acc", None),
        ("reported", 67.31),
        ("external", "67"),
        ("additional_data", "false"),
        ("unreliable", 0),
        ("number_forward_passes", "1"),
        ("number_forward_passes", True),
        ("number_forward_passes", 0),
        ("eps", 8 / 255),
        ("eps", "eight"),
        ("eps", "-8/255"),
        ("eps", None),
        ("name", " "),
        ("dataset", ""),
        ("footnote", None),
    ],
)
def test_every_wrong_value_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        check_model_info(PUBLISHED | {key: value})


def test_all_problems_come_at_once():
    broken = PUBLISHED | {"clean_acc": 92.44, "eps": 0.03}
    del broken["venue"]
    with pytest.raises(ValueError, match=r"missing: venue.*eps must be str.*clean_acc must be str"):
        check_model_info(broken)


def test_corruptions_have_another_accuracy_and_no_eps():
    common = {k: v for k, v in PUBLISHED.items() if k != "autoattack_acc"} | {"corruptions_acc": "80.10", "eps": None}
    assert check_model_info(common) == common
    with pytest.raises(ValueError, match="corruptions_acc"):
        check_model_info(common | {"corruptions_acc": 80.1})


@pytest.mark.parametrize("key", ["eps", "clean_accuracy", "robust_accuracy", "norm"])
def test_an_unfinished_evaluation_is_refused(key):
    with pytest.raises(ValueError, match=f"lacks {key}"):
        info(**{key: None})


@pytest.mark.parametrize(("accuracy", "error"), [(92.4, "did you mean 0.924"), (-0.1, "must be a fraction"),
                                                 (float("nan"), "must be a fraction")])  # fmt: skip
def test_accuracy_must_be_a_fraction(accuracy, error):
    with pytest.raises(ValueError, match=error):
        info(clean_accuracy=accuracy)


def test_a_paper_needs_a_title():
    with pytest.raises(ValueError, match="title"):
        Paper("", "A", "https://example.org")
    with pytest.raises(ValueError, match=r"did you mean 0\.67"):
        Paper("T", "A", "https://example.org", reported=67)


def test_written_where_robustbench_looks(tmp_path):
    path = write_model_info(PUBLISHED, tmp_path, "Wang2023Better_WRN-28-10", "Linf")
    assert path == tmp_path / "cifar10" / "Linf" / "Wang2023Better_WRN-28-10.json"
    assert json.loads(path.read_text()) == PUBLISHED


@pytest.mark.parametrize("model_id", ["../up", "a/b", "", ".hidden", "C:\\x", "a\n"])
def test_no_name_leaves_the_folder(tmp_path, model_id):
    with pytest.raises(ValueError, match="model_id"):
        write_model_info(PUBLISHED, tmp_path / "in", model_id, "Linf")
    assert not (tmp_path / "in").exists()
