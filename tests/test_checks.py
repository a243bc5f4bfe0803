"""Each check lets good values through and says what to do about bad ones."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from at_extensions import checks

NAMES = ["resnet18", "preact_resnet18", "wide_resnet_28_10", "small_cnn"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet_18", "'resnet18'"),
        ("PreActResNet18", "'preact_resnet18'"),
        ("WideResNet-28-10", "'wide_resnet_28_10'"),
        ("smallcnn", "'small_cnn'"),
    ],
)
def test_unknown_names_bring_the_nearest_ones(name, nearest):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; did you mean .*{nearest}"):
        checks.check_name("model", name, NAMES)


def test_a_name_near_to_none_brings_the_list():
    with pytest.raises(ValueError, match=r"unknown model 'qqqq'; known: preact_resnet18, resnet18, small_cnn, wide"):
        checks.check_name("model", "qqqq", iter(NAMES))
    with pytest.raises(ValueError, match="known: none"):
        checks.check_name("option", "qqqq", [])
    with pytest.raises(ValueError, match=r"m19, \.\.\.$"):
        checks.check_name("model", "qqqq", [f"m{i:02}" for i in range(30)])


def test_known_names_pass():
    assert checks.check_name("model", "resnet18", (n for n in NAMES)) == "resnet18"
    assert [checks.check_norm(norm) for norm in ("Linf", "L2", "L1")] == ["Linf", "L2", "L1"]
    with pytest.raises(ValueError, match="did you mean 'Linf'"):
        checks.check_norm("linf")


@given(
    value=st.floats(),
    low=st.one_of(st.none(), st.floats(-2, 0)),
    high=st.one_of(st.none(), st.floats(0, 2)),
    strict=st.booleans(),
)
def test_numbers_pass_exactly_within_their_bounds(value, low, high, strict):
    bounds = {"above": low, "below": high} if strict else {"at_least": low, "at_most": high}
    above = low is None or (value > low if strict else value >= low)
    below = high is None or (value < high if strict else value <= high)
    if math.isfinite(value) and above and below:
        assert checks.check_number("alpha", value, **bounds) == value
    else:
        with pytest.raises(ValueError, match=r"^alpha must lie in [\[(].*[\])], got "):
            checks.check_number("alpha", value, **bounds)


@pytest.mark.parametrize("value", [True, "0.1", None, torch.tensor(0.1), [0.1], 1j])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match="alpha must be a number"):
        checks.check_number("alpha", value)
    with pytest.raises(TypeError, match="eps must be a number such as 8/255"):
        checks.check_eps(value)


@pytest.mark.parametrize("value", [True, 1.0, "3", None, torch.tensor(3)])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(TypeError, match="steps must be a whole number"):
        checks.check_count("steps", value)


def test_counts_have_a_lower_bound():
    assert checks.check_count("steps", 1) == 1
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        checks.check_count("steps", 0)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        checks.check_count("num_classes", 1, at_least=2)


def test_numpys_numbers_become_pythons():
    count, number, eps = np.int64(3), np.float32(0.5), np.float32(0.25)
    assert type(checks.check_count("steps", count)) is int
    assert type(checks.check_number("alpha", number)) is float
    assert type(checks.check_eps(eps)) is float
    assert checks.check_eps(Fraction(8, 255)) == 8 / 255


@pytest.mark.parametrize("eps", [8 / 255, 1.0, 1, 1e-9])
def test_radii_in_the_unit_interval_pass(eps):
    assert checks.check_eps(eps) == eps


@pytest.mark.parametrize(
    ("eps", "says"),
    [
        (8, r"must lie in \(0, 1\] for images in \[0, 1\], got 8; did you mean 8/255\?"),
        (4.0, r"did you mean 4/255\?"),
        (255, r"did you mean 255/255\?"),
        (0, r"got 0$"),
        (-0.1, r"got -0\.1$"),
        (300, r"got 300$"),
        (math.nan, r"got nan$"),
        (math.inf, r"got inf$"),
    ],
)
def test_other_linf_radii_say_what_was_meant(eps, says):
    with pytest.raises(ValueError, match=says):
        checks.check_eps(eps)
    with pytest.raises(ValueError, match="radius"):
        checks.check_eps(eps, name="radius")


def test_l2_and_l1_radii_are_any_positive_number():
    for norm in ("L2", "L1"):
        assert checks.check_eps(12.5, norm) == 12.5
        for eps in (0, -1, math.inf, math.nan):
            with pytest.raises(ValueError, match="eps must be a positive number"):
                checks.check_eps(eps, norm)


@given(numerator=st.integers(-1000, 1000), denominator=st.integers(1, 1000))
def test_fractions_read_as_what_they_say(numerator, denominator):
    assert checks.parse_fraction(f"{numerator} / {denominator}") == numerator / denominator
    assert checks.parse_fraction(numerator) == numerator
    assert checks.parse_fraction(repr(numerator / denominator)) == numerator / denominator


@pytest.mark.parametrize("text", ["", "eight", "8/0", "8/255/2", "nan", None, [8], True])
def test_what_is_no_fraction_is_refused(text):
    with pytest.raises(ValueError, match="a number or a fraction such as 8/255"):
        checks.parse_fraction(text)


GOOD = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "images", [GOOD, GOOD.double(), GOOD.bfloat16(), torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)]
)
def test_images_in_the_unit_box_pass_as_they_are(images):
    assert checks.check_images(images) is images


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (GOOD.numpy(), TypeError, r"must be a torch tensor \(B, C, H, W\), got ndarray"),
        ((GOOD * 255).byte(), TypeError, r"use images\.float\(\) / 255"),
        (GOOD[0], ValueError, r"must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
        (GOOD[:0], ValueError, r"empty: shape \(0, 3, 4, 4\)"),
        (GOOD * 255, ValueError, r"must lie in \[0, 1\], got \[.*normalisation belongs inside the model"),
        ((GOOD - 0.5) / 0.25, ValueError, r"must lie in \[0, 1\]"),
        (GOOD.clone().index_fill_(0, torch.tensor([1]), math.nan), ValueError, "not finite"),
        (GOOD.clone().index_fill_(0, torch.tensor([1]), math.inf), ValueError, "not finite"),
        (torch.full((1, 1, 1, 1), 1.001), ValueError, r"must lie in \[0, 1\], got \[1\.001, 1\.001\]"),
        (torch.full((1, 1, 1, 1), -0.001), ValueError, r"must lie in \[0, 1\]"),
    ],
)
def test_other_images_are_refused(images, error, says):
    with pytest.raises(error, match=says):
        checks.check_images(images)


def test_images_are_called_what_the_caller_calls_them():
    with pytest.raises(ValueError, match=r"^x must have shape"):
        checks.check_images(GOOD[0], name="x")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_class_numbers_pass_as_they_are(dtype):
    labels = torch.tensor([0, 2, 1], dtype=dtype)
    assert checks.check_labels(labels, 3, size=3) is labels
    assert checks.check_labels(labels) is labels


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        ([0, 1, 2], TypeError, r"must be a torch tensor \(B,\), got list"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "integer dtype, got torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "integer dtype, got torch.bool"),
        (torch.eye(3).long(), ValueError, "one-hot labels are not supported"),
        (torch.tensor([0, 1]), ValueError, "got 2 labels for 3 images"),
        (torch.tensor([0, 3, 1]), ValueError, "class numbers from 0 to 2, got 0 to 3"),
        (torch.tensor([0, -1, 1]), ValueError, "class numbers from 0 to 2, got -1 to 1"),
    ],
)
def test_other_labels_are_refused(labels, error, says):
    with pytest.raises(error, match=says):
        checks.check_labels(labels, 3, size=3)


def test_negative_labels_are_refused_where_the_classes_are_not_counted():
    with pytest.raises(ValueError, match="class numbers from 0, got -1 to 5"):
        checks.check_labels(torch.tensor([5, -1]))


@pytest.mark.parametrize(
    ("logits", "error", "says"),
    [
        ((torch.zeros(2, 3),), TypeError, r"one tensor of logits \(B, K\), got tuple"),
        (torch.zeros(2, 3, dtype=torch.long), TypeError, "one tensor of logits"),
        (torch.zeros(8, 3), ValueError, r"for 2 images it returned \(8, 3\) \(is the architecture made for this"),
        (torch.zeros(2), ValueError, r"returned \(2,\)"),
        (torch.zeros(2, 3, 1), ValueError, r"returned \(2, 3, 1\)"),
        (torch.zeros(2, 1), ValueError, "K at least 2"),
        (torch.zeros(2, 4), ValueError, "the model has 4 outputs, the data 3 classes"),
    ],
)
def test_what_is_no_logits_is_refused(logits, error, says):
    with pytest.raises(error, match=says):
        checks.check_logits(logits, 2, 3)


def test_logits_pass_as_they_are():
    logits = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert checks.check_logits(logits, 2, 3) is checks.check_logits(logits, 2) is logits


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.01, 1.0, 50.0]))
def test_probabilities_are_told_from_logits(seed, scale):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) * scale
    assert checks.looks_like_probabilities(logits.softmax(1))
    assert not checks.looks_like_probabilities(logits)
    assert not checks.looks_like_probabilities(torch.cat([logits.softmax(1), logits]))


def test_a_model_is_a_module_and_knows_its_device():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        checks.check_model(lambda x: x)
    assert checks.device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert checks.device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert checks.device_of(nn.Flatten()).type == "cpu"
