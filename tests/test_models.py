"""Models against RobustBench's and timm's own classes, their published sizes, and their features."""

import copy
import json

import pytest
import timm
import torch
import yaml
from torch import nn

from at_extensions import models, runs
from at_extensions.models import classifier_of, create_model, fresh_like, list_models, logits_and_features
from at_extensions.weights import load_weights

PUBLISHED = {  # parameters with 10 classes
    "cifar_resnet18": 11_173_962,
    "cifar_resnet34": 21_282_122,
    "cifar_resnet50": 23_520_842,
    "preact_resnet18": 11_172_170,  # 11,171,146 and the BatchNorm before the classifier
    "wide_resnet_28_10": 36_479_194,
    "wide_resnet_34_10": 46_160_474,
    "wide_resnet_70_16": 266_796_506,
    "dm_wide_resnet_28_10": 36_479_194,
    "dm_wide_resnet_70_16": 266_796_506,
}


@pytest.mark.parametrize("name", models._CIFAR)
def test_every_cifar_network_makes_logits_and_has_its_published_size(name):
    with torch.device("meta"):  # shapes alone: no network is computed
        model = create_model(name, 10)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
        assert create_model(name, 43)(torch.rand(2, 3, 32, 32)).shape == (2, 43)
    if name in PUBLISHED:
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def images(n=2, channels=3, size=32, seed=0, dtype=torch.float32):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def disturb(model, seed=0):
    """Give BatchNorm a history, so that a wrong place for it shows."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def robustbench_class(name):
    from robustbench.model_zoo.architectures import resnet, wide_resnet

    return {
        "preact_resnet18": lambda: resnet.PreActResNet(resnet.PreActBlock, [2, 2, 2, 2], bn_before_fc=True),
        "cifar_resnet18": resnet.ResNet18,
        "cifar_resnet50": resnet.ResNet50,
        "wide_resnet_10_2": lambda: wide_resnet.WideResNet(depth=10, widen_factor=2),
    }[name]()


@pytest.mark.parametrize("name", ["preact_resnet18", "cifar_resnet18", "wide_resnet_10_2"])
def test_it_is_robustbenchs_class_on_normalised_images(name):
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    model, x = disturb(create_model(name, 10, mean=mean, std=std)), images()
    theirs = robustbench_class(name).eval()
    theirs.load_state_dict(model.network.state_dict())
    normalised = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(model(x), theirs(normalised))
    assert (model(x) - theirs(x)).abs().max() > 1e-3


def test_preact_resnet18_has_its_batchnorm_before_the_classifier():
    model = disturb(create_model("preact_resnet18", 10, width=4))
    before = model(images())
    model.network.bn.bias.data += 1
    assert (model(images()) - before).abs().max() > 1e-3


def padded(small, full):
    """A full-width state dict that holds the narrow one in its first channels and makes all others zero."""
    out = {}
    for key, value in full.items():
        out[key] = torch.zeros_like(value) if "running_var" not in key else torch.ones_like(value)
        out[key][tuple(slice(n) for n in small[key].shape)] = small[key]
    return out


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [("cifar_resnet18", 8, 3), ("preact_resnet18", 5, 3), ("cifar_resnet50", 4, 1), ("preact_resnet18", 64, 1)],
)
def test_a_narrow_resnet_is_the_full_one_with_all_other_channels_zero(name, width, channels):
    narrow = disturb(create_model(name, 10, width=width, in_chans=channels))
    full = robustbench_class(name).eval()
    full.load_state_dict(padded(narrow.network.state_dict(), full.state_dict()))
    x = images(1, channels)
    three = torch.cat([x, torch.zeros(1, 3 - channels, 32, 32)], 1)
    torch.testing.assert_close(narrow(x), full(three), rtol=1e-4, atol=1e-5)
    assert narrow.network.conv1.weight.shape == (width, channels, 3, 3)


def test_small_cnn_takes_tiny_images_of_any_channels():
    for size, channels in ((8, 1), (9, 2), (32, 3)):
        model = create_model("small_cnn", 4, in_chans=channels, width=2).eval()
        logits = model(images(3, channels, size))
        assert logits.shape == (3, 4)
        assert logits.std(0).min() > 0  # every logit depends on the image


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_efficientnet", "convnext_atto"])
def test_a_timm_network_is_timms_on_normalised_images(name):
    model = create_model(name, 7).eval()
    theirs = timm.create_model(name, num_classes=7).eval()
    theirs.load_state_dict(model.network.state_dict())
    x = images(1, size=theirs.pretrained_cfg["input_size"][-1] if "vit" in name else 64)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(model(x), theirs((x - mean) / std))


def test_mean_and_std_of_ones_own_replace_timms_and_grey_images_take_their_average():
    model = create_model("test_efficientnet", 3, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.std.flatten().tolist() == [1, 2, 3]
    grey = create_model("test_efficientnet", 3, in_chans=1)
    config = timm.create_model("test_efficientnet").pretrained_cfg
    assert grey.mean.item() == pytest.approx(sum(config["mean"]) / 3)
    assert grey(images(2, 1, 64)).shape == (2, 3)


def test_normalisation_that_does_nothing_changes_no_bit():
    model = create_model("small_cnn", 3, width=2).eval()
    assert torch.equal(model(images(size=8)), model.network(images(size=8)))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet_18", {}, "unknown model 'resnet_18'; did you mean 'resnet18'"),
        ("PreActResNet18", {}, "did you mean 'preact_resnet18'"),
        ("wrn_28_10", {}, "did you mean 'wide_resnet_28_10'"),
        ("wide_resnet_11_2", {}, r"wide_resnet_11_2: a wide ResNet's depth is 6 n \+ 4 \(10, 16, 22"),
        ("wide_resnet_4_2", {}, "depth is 6 n"),
        ("wide_resnet_28_0", {}, "width at least 1"),
        ("dm_wide_resnet_29_10", {}, "dm_wide_resnet_29_10: a wide"),
        ("wide_resnet_10_1", {"in_chans": 1}, "takes images of 3 channels, not 1; use small_cnn or a cifar_resnet"),
        ("small_cnn", {"num_classes": 1}, "num_classes must be at least 2"),
        ("small_cnn", {"in_chans": 0}, "in_chans must be at least 1"),
        ("small_cnn", {"width": 0}, "width must be at least 1"),
        ("cifar_resnet18", {"width": -4}, "width must be at least 1"),
        ("small_cnn", {"mean": (0.5,)}, r"mean needs one number a channel \(3\), got 1"),
        ("small_cnn", {"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ("small_cnn", {"std": (1.0, float("nan"), 1.0)}, "std must be positive"),
    ],
)
def test_what_cannot_be_built_says_why(name, options, says):
    with pytest.raises(ValueError, match=says):
        create_model(name, **({"num_classes": 10} | options))


def test_names_are_checked_without_building():
    for name in ("resnet18", "resnet18.a1_in1k", "preact_resnet18", "wide_resnet_22_3", "hf_hub:someone/something"):
        assert models.check_known(name) == name
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        models.check_known("resnet_18")
    with pytest.raises(ValueError, match="depth is 6 n"):
        models.check_known("wide_resnet_11_2")


def test_a_model_that_fits_the_images_is_returned_unchanged(untouched):
    model, image = create_model("small_cnn", 3, width=2).train(), images(1, size=8)[0]
    with untouched(model):
        assert models.check_fits(model, image, "digits") is model
    with untouched(model), pytest.raises(ValueError, match="does not take images of 2 x 8 x 8 from digits: "):
        models.check_fits(model, image[:2], "digits")


def test_names_are_listed_by_pattern():
    listed = list_models()
    assert listed[0] == "small_cnn"
    assert {"preact_resnet18", "wide_resnet_28_10", "resnet50", "vit_tiny_patch16_224"} <= set(listed)
    assert list_models("preact*") == ["preact_resnet18"]
    assert list_models("qqq*") == []


RECIPES = {
    "small_cnn": {"num_classes": 3, "in_chans": 1, "width": 2, "mean": (0.4,), "std": (0.3,)},
    "preact_resnet18": {"num_classes": 3, "width": 4},
    "wide_resnet_10_1": {"num_classes": 3, "dropRate": 0.3},
    "dm_wide_resnet_10_1": {"num_classes": 3},
    "test_efficientnet": {"num_classes": 3, "drop_rate": 0.1},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_text_and_with_its_weights_gives_the_same_logits(tmp_path, name):
    model = disturb(create_model(name, **RECIPES[name]))
    assert yaml.safe_load(yaml.safe_dump(model.recipe)) == json.loads(json.dumps(model.recipe)) == model.recipe
    path = runs.save_weights(model, tmp_path / "weights.safetensors")
    x = images(2, model.mean.shape[1])
    loaded = models.load_model(path)
    assert not loaded.training
    assert torch.equal(loaded(x), model(x))
    again = models.from_recipe(json.loads(json.dumps(model.recipe)))
    load_weights(again, path)
    assert torch.equal(again.eval()(x), model(x))


def test_the_normalisation_that_a_checkpoint_brings_is_used(tmp_path):
    model = create_model("small_cnn", 3, width=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).eval()
    plain = create_model("small_cnn", 3, width=2).eval()
    load_weights(plain, runs.save_weights(model, tmp_path / "weights.safetensors"))
    assert torch.equal(plain(images(size=8)), model(images(size=8)))


def test_a_recipe_says_nothing_of_where_weights_came_from(tmp_path):
    theirs = timm.create_model("test_efficientnet", num_classes=3)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    model = create_model("test_efficientnet", 3, checkpoint_path=str(tmp_path / "timm.pth"))
    assert torch.equal(model.network.classifier.weight, theirs.classifier.weight)
    assert "checkpoint_path" not in model.recipe
    assert not torch.equal(fresh_like(model, 0).network.classifier.weight, theirs.classifier.weight)


@pytest.mark.parametrize("foreign", [{"checkpoint_path": "elsewhere.pth"}, {"pretrained": True}])
def test_a_recipe_that_fetches_weights_is_refused(foreign):
    recipe = {"name": "test_efficientnet", "num_classes": 3} | foreign
    with pytest.raises(ValueError, match="names an architecture, not where weights come from"):
        models.from_recipe(recipe)


@pytest.mark.parametrize("recipe", [{}, {"name": "small_cnn"}, {"name": "small_cnn", "num_classes": 3, "colour": 1}])
def test_what_is_no_recipe_is_refused(recipe):
    with pytest.raises(ValueError, match="not a recipe of create_model"):
        models.from_recipe(recipe)


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18", "test_efficientnet", "test_vit"])
def test_fresh_weights_are_the_seeds_alone(untouched, name):
    model = create_model(name, 3, **({"width": 4} if "test" not in name else {}))
    with untouched(model):
        first = fresh_like(model, 5)
    torch.manual_seed(0)
    again, other = fresh_like(model, 5), fresh_like(model, 6)
    drawn = [key for key, value in model.named_parameters() if value.std() > 0]
    assert len(drawn) > 3
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    for key in drawn:
        assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
        assert not torch.equal(first.state_dict()[key], model.state_dict()[key])
    assert first.recipe == model.recipe


def test_a_fresh_model_follows_dtype_device_and_mode():
    model = create_model("small_cnn", 3, width=2)
    fresh = fresh_like(model.double().eval(), 0)
    assert {p.dtype for p in fresh.parameters()} == {torch.float64}
    assert not any(m.training for m in fresh.modules())
    assert fresh_like(model.train(), 0).training
    assert fresh_like(model.to("meta"), 0).mean.device.type == "meta"
    assert torch.equal(fresh_like(copy.deepcopy(fresh), 3).mean, fresh.mean)


def test_a_model_of_ones_own_has_no_fresh_one():
    assert models.recipe_of(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="pass fresh=, a callable seed -> module"):
        fresh_like(nn.Linear(2, 2), 0)


NETWORKS = {
    "small_cnn": ({"width": 2}, 8),
    "preact_resnet18": ({"width": 4}, 32),
    "wide_resnet_10_1": ({}, 32),
    "dm_wide_resnet_10_1": ({}, 32),
    "resnet10t": ({}, 64),
    "test_vit": ({}, 160),
    "convnext_atto": ({}, 64),
    "dla46x_c": ({}, 64),  # its classifier is a 1 x 1 convolution
    "mobilenetv3_small_050": ({}, 64),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_times_the_classifiers_weights_are_the_logits(untouched, name):
    options, size = NETWORKS[name]
    model = create_model(name, 5, **options).double().eval()
    x = images(2, size=size, dtype=torch.float64)
    head = classifier_of(model)
    with untouched(model):
        logits, features = logits_and_features(model, x)
    assert torch.equal(logits, model(x))
    torch.testing.assert_close(features @ head.weight.flatten(1).T + head.bias, logits)
    assert features.ndim == 2
    assert features.requires_grad
    assert model.get_classifier() is head


def test_features_of_a_users_own_model_and_of_a_wrapper_around_ours(small_net, batch, untouched):
    net, (x, _) = small_net(1, train=False), batch(2)
    with untouched(net):
        logits, features = logits_and_features(net, x)
    assert torch.equal(features, net[:5](x))
    wrapped = nn.Sequential(create_model("small_cnn", 3, in_chans=2, width=2).double().eval())
    logits, features = logits_and_features(wrapped, x)
    assert torch.equal(logits, wrapped(x))
    assert features.shape == (4, 16)


class Awkward(nn.Module):
    """A network whose last linear layer is not what makes the logits."""

    def __init__(self, how):
        super().__init__()
        self.how, self.body, self.head = how, nn.Conv2d(2, 3, 5), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.body(x).flatten(1)
        if self.how == "twice":
            return self.head(self.head(hidden))
        if self.how == "unused":
            return hidden
        if self.how == "half":
            return torch.cat([self.head(hidden), hidden], 1)
        raise RuntimeError("broken")


@pytest.mark.parametrize("how", ["twice", "unused", "half"])
def test_a_linear_layer_that_does_not_make_the_logits_is_refused(batch, untouched, how):
    net = Awkward(how).double()
    with untouched(net), pytest.raises(ValueError, match="the last linear layer does not make the logits"):
        logits_and_features(net, batch(3)[0])


def test_no_hook_stays_after_an_exception(batch, untouched):
    net = Awkward("broken").double()
    with untouched(net), pytest.raises(RuntimeError, match="broken"):
        logits_and_features(net, batch(4)[0])


def test_a_model_without_one_classifier_is_refused(untouched):
    levit = create_model("levit_128s", 3)
    with untouched(levit), pytest.raises(ValueError, match=r"LevitDistilled has no single linear classifier \(tuple\)"):
        logits_and_features(levit, images(size=224))
    with pytest.raises(ValueError, match=r"Sequential has no single linear classifier \(NoneType\)"):
        classifier_of(nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten()))
    with pytest.raises(ValueError, match=r"no single linear classifier \(Identity\)"):
        classifier_of(timm.create_model("test_efficientnet", num_classes=0))


def test_loading_a_model_draws_from_no_global_generator(tmp_path):
    path = runs.save_weights(create_model("small_cnn", 3, in_chans=1, width=2), tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    models.load_model(path)
    assert torch.equal(torch.get_rng_state(), before)
