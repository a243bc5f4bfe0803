"""Logits of images with a changed window against those of the whole image, in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.evaluation.attacks.reach import Rectangle
from at_extensions.evaluation.attacks.windows import Windows, windows_of
from at_extensions.folding import TwinWarning, fold_batchnorm
from at_extensions.models import create_model


def prepared(model, seed=0):
    """In float64 and eval mode, every BatchNorm far from the identity."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.5)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def images(n=4, size=32, channels=3):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def corners(side, size):
    """All four, the borders, and the middle."""
    places = sorted({0, min(1, side - size), (side - size) // 2, side - size})
    return [(top, left) for top in places for left in places]


def assert_looks_equal(model, windows, x, sizes, tolerance=1e-10):
    """Looks and acceptances, one after the other, against the model on the whole images."""
    x, generator = x.clone(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for size in sizes:
            logits, moved = model(x), 0.0
            torch.testing.assert_close(windows.remember(x, size), logits, rtol=0, atol=tolerance * logits.abs().max())
            for number, (top, left) in enumerate(corners(x.shape[2], size)):
                window = torch.rand(len(x), x.shape[1], size, size, generator=generator, dtype=x.dtype)
                changed = x.clone()
                changed[:, :, top : top + size, left : left + size] = window
                truth, before = model(changed), model(x)
                moved = max(moved, float((truth - before).abs().max()))
                torch.testing.assert_close(
                    windows.look(window, top, left), truth, rtol=0, atol=tolerance * truth.abs().max()
                )
                rows = torch.tensor([[], [0], [1, 3], [0, 1, 2, 3]][number % 4], dtype=torch.long)
                windows.accept(rows)
                x[rows] = changed[rows]
            assert moved > 1e3 * tolerance * logits.abs().max()


SIZES = (1, 2, 5, 9, 20)
NETWORKS = [
    ("cifar_resnet18", {"width": 4}, 32),
    ("cifar_resnet50", {"width": 2}, 32),
    ("preact_resnet18", {"width": 4}, 32),
    ("wide_resnet_10_2", {}, 32),
    ("dm_wide_resnet_10_1", {}, 32),
    ("small_cnn", {"width": 6}, 32),
    ("resnet18", {}, 64),
    ("regnetx_002", {}, 64),
    ("mobilenetv3_small_050", {}, 64),
    ("tinynet_e", {}, 64),
    ("densenet121", {"growth_rate": 8, "block_config": (2, 3, 4, 2)}, 64),
]


@pytest.mark.parametrize(("name", "options", "side"), NETWORKS, ids=[case[0] for case in NETWORKS])
def test_every_network_tells_what_it_tells_of_whole_images(name, options, side):
    model = prepared(create_model(name, 5, **options))
    windows = windows_of(fold_batchnorm(model, only_folded=False))
    windows.remember(images(size=side), 1)
    assert windows.saves
    assert_looks_equal(model, windows, images(size=side), SIZES if side == 32 else (1, 7))


def built(*layers, side=14):
    """The twin's windows of a small network around layers for eight channels, and the network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *layers, nn.Flatten(), nn.LazyLinear(3))
    model(torch.rand(2, 3, side, side))
    model = prepared(model)
    return model, windows_of(fold_batchnorm(model))


class Branches(nn.Module):
    """What is done with a map's two branches."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 1)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def iadd_then_relu(net, x):
    out = net.a(x)
    out += net.b(x)
    return F.relu_(out)


LAYERS = {
    "strided": nn.Conv2d(8, 8, 3, stride=2, padding=1),
    "strided, even": nn.Conv2d(8, 8, 2, stride=2),
    "one of four pixels": nn.Conv2d(8, 8, 1, stride=3),
    "dilated": nn.Conv2d(8, 8, 3, padding=2, dilation=2),
    "of groups": nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "of two shapes": nn.Conv2d(8, 8, (1, 3), stride=(2, 1), padding=(0, 2)),
    "same": nn.Conv2d(8, 8, 3, padding="same"),
    "valid": nn.Conv2d(8, 8, 4, padding="valid"),
    "reflecting": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(8, 8, 2, stride=2),
    "maximum": nn.MaxPool2d(3, stride=2, padding=1),
    "mean": nn.AvgPool2d(2),
    "mean with borders": nn.AvgPool2d(3, stride=1, padding=1),
    "mean within borders": nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
    "rounded up": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "of instances": nn.InstanceNorm2d(8),
    "BatchNorm": nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)),
    "activations": nn.Sequential(nn.SiLU(inplace=True), nn.GELU(), nn.LeakyReLU(0.2, inplace=True), nn.ELU(0.7, True)),
    "more": nn.Sequential(nn.Tanh(), nn.Mish(), nn.Hardswish(True), nn.Sigmoid(), nn.Dropout(), nn.Identity()),
    "sum": Branches(lambda net, x: net.a(x) + net.b(x)),
    "sum in place": Branches(iadd_then_relu),
    "sum with an ordinary number": Branches(lambda net, x: 1 - net.a(x) * 2 + net.b(x) / 3),
    "product": Branches(lambda net, x: net.a(x) * torch.sigmoid(net.b(x))),
    "scale of channels": Branches(lambda net, x: net.a(x) * net.b.bias.view(1, -1, 1, 1)),
    "pattern": Branches(lambda net, x: net.a(x) + torch.arange(14.0).view(1, 1, 1, 14)),
    "attention": Branches(lambda net, x: net.a(x) * x.mean((2, 3), keepdim=True)),
    "concatenation": Branches(lambda net, x: torch.cat([net.a(x), x], 1)),
    "part": Branches(lambda net, x: net.a(x)[:, ::2] + net.b(x)[:, :4]),
    "weighted sum": Branches(lambda net, x: torch.add(net.a(x), x, alpha=2)),
    "shuffle": nn.PixelShuffle(2),
    "flipped": Branches(lambda net, x: net.a(x).flip(3)),
    "transposed map": Branches(lambda net, x: net.a(x).transpose(2, 3)),
    "spread": Branches(lambda net, x: net.a(x) + net.b(x).amax(2, keepdim=True)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_of_every_kind(layer):
    model, windows = built(layer)
    assert_looks_equal(model, windows, images(size=14), (1, 2, 4, 14))


def test_what_others_still_read_is_not_overwritten():
    def late(net, x):
        out = net.a(x)
        F.relu_(out)
        return out + x

    def through_a_name(net, x):
        same = net.identity(x)
        same.add_(1)
        return net.a(x) + same

    def of_a_part(net, x):
        out = net.a(x)
        part = out[:, :, :3]
        part.add_(1)
        return out * 2

    nothing = nn.Sequential(nn.Identity(), nn.Dropout())
    for function, identity in (
        (late, None),
        (through_a_name, nn.Identity()),
        (through_a_name, nothing),
        (of_a_part, None),
    ):
        _, windows = built(Branches(function, identity=identity))
        assert windows is None, function


def test_a_window_of_one_size_after_another_and_of_a_side_that_is_not_square():
    model, windows = built(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), side=12)
    x = images(size=12)
    windows.remember(x, 4)
    for height, width, top, left in ((4, 2, 0, 10), (1, 4, 11, 8), (3, 3, 9, 0)):
        window = images(size=4)[:, :, :height, :width]
        x[:, :, top : top + height, left : left + width] = window
        torch.testing.assert_close(windows.look(window, top, left), model(x), rtol=0, atol=1e-10)
        windows.accept(torch.arange(4))


def test_a_large_window_saves_nothing_and_is_right():
    model, windows = built(nn.ReLU())
    x = images(size=14)
    windows.remember(x, 13)
    assert not windows.saves
    window = 1 - x[:, :, :13, :13]
    truth = x.clone()
    truth[:, :, :13, :13] = window
    torch.testing.assert_close(windows.look(window, 0, 0), model(truth), rtol=0, atol=1e-10)


def test_the_images_remembered_are_nobody_elses():
    model, windows = built(nn.ReLU())
    x = images(size=14)
    before = x.clone()
    windows.remember(x, 2)
    windows.look(torch.zeros(4, 3, 2, 2, dtype=x.dtype), 3, 3)
    windows.accept(torch.arange(4))
    assert torch.equal(x, before)
    before[:, :, 3:5, 3:5] = 0
    x.zero_()
    window = torch.ones(4, 3, 1, 1, dtype=x.dtype)
    before[:, :, 0:1, 0:1] = window
    torch.testing.assert_close(windows.look(window, 0, 0), model(before), rtol=0, atol=1e-10)


def test_there_are_none_where_hooks_would_not_be_called():
    twin = fold_batchnorm(create_model("small_cnn", 3, width=4).eval())
    assert windows_of(twin) is not None
    for module in (nn.modules.module, twin.network):
        register = getattr(module, "register_module_forward_hook", None) or module.register_forward_hook
        handle = register(lambda *args: None)
        with pytest.raises(ValueError, match="hooks"):
            Windows(twin)
        handle.remove()


def test_hooks_within_the_network_are_called_with_whole_images():
    model = prepared(create_model("cifar_resnet18", 5, width=4))
    shapes = []
    model.network.layer1[1].conv1.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    windows = windows_of(fold_batchnorm(model))
    shapes.clear()
    assert_looks_equal(model, windows, images(), (2,))
    assert set(shapes) == {torch.Size([4, 4, 32, 32])}


def test_a_model_that_cannot_be_traced_has_none():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = create_model("small_cnn", 3, width=4)

        def forward(self, x):
            return self.net(x) if x.mean() > 0 else -self.net(x)

    twin = fold_batchnorm(create_model("small_cnn", 3, width=4).eval())
    twin.network = Asks()
    with pytest.warns(TwinWarning, match="Square computes whole images: TraceError"):
        assert windows_of(twin) is None
    assert windows_of(lambda x: x) is None


def test_there_are_none_on_other_devices():
    twin = fold_batchnorm(create_model("small_cnn", 3, width=4).eval())
    twin.model.to("meta")
    assert twin.device.type == "meta"
    assert windows_of(twin) is None


def test_in_bfloat16_it_is_as_exact_as_the_model():
    torch.manual_seed(0)
    model = create_model("cifar_resnet18", 5, width=8).eval()
    x = images().float()
    window = 1 - x[:, :, 4:7, 9:12]
    changed = x.clone()
    changed[:, :, 4:7, 9:12] = window
    truth = prepared(create_model("cifar_resnet18", 5, width=8))
    truth.load_state_dict(model.state_dict())
    with torch.no_grad():
        truth = truth(changed.double())
        with torch.autocast("cpu", torch.bfloat16):
            twin = fold_batchnorm(model)
            theirs = model(changed)
            windows = windows_of(twin)
        windows.remember(x, 3)
        ours = windows.look(window, 4, 9)
    assert ours.dtype is torch.bfloat16
    assert (ours - truth).norm() < 1.5 * (theirs - truth).norm() + 0.01 * truth.norm()


def test_rectangles():
    a, b = Rectangle(0, 4, 2, 5), Rectangle(3, 6, 1, 3)
    assert a.joined(b) == Rectangle(0, 6, 1, 5)
    assert a.overlap(b) == Rectangle(3, 4, 2, 3)
    assert a.overlap(Rectangle(4, 5, 2, 5)) is None
    assert Rectangle(-1, 9, -2, 3).clipped((8, 8)) == Rectangle(0, 8, 0, 3)
    assert b.within(Rectangle(2, 9, 1, 9)) == Rectangle(1, 4, 0, 2)
