"""Kernels of small networks, each with something that could go wrong, against explicit gradients of single samples."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from at_extensions.analysis import empirical_ntk, ntk_cost

CHANNELS, SIDE = 2, 6


def images(n=5, seed=0):
    return torch.rand(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Head(nn.Module):
    """Layers, the mean over pixels or tokens, and a linear layer."""

    def __init__(self, body, width, classes=3):
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(x).flatten(2).mean(2))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.Tanh(), nn.Linear(9, 8, bias=False), nn.Tanh(),
                         nn.Linear(8, 3))  # fmt: skip


def batchnorm():
    layers = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3),
              nn.BatchNorm2d(6), nn.ReLU(inplace=True)]  # fmt: skip
    for norm in (layers[1], layers[4]):
        for buffer in (norm.running_mean, norm.running_var):
            buffer.uniform_(0.5, 1.5)
    return Head(nn.Sequential(*layers), 6)


def pixel_gram():
    """Convolutions with many channels and few pixels, with and without padding."""
    layers = [nn.Conv2d(2, 32, 5), nn.Tanh(), nn.Conv2d(32, 40, 3, padding=1), nn.Tanh(),
              nn.Conv2d(40, 32, 2, padding=(0, 1)), nn.Tanh(), nn.Conv2d(32, 32, (1, 3))]  # fmt: skip
    return Head(nn.Sequential(*layers), 32)


def wide():
    """Too many pixels for a Gram route, and too many weights to keep a gradient for each sample."""
    return Head(nn.Sequential(nn.Conv2d(2, 32, 1), nn.Tanh(), nn.Conv2d(32, 32, 3, padding=1)), 32)


def strided():
    return Head(nn.Sequential(nn.Conv2d(2, 24, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(24, 32, 3, stride=(2, 3)),
                              nn.Tanh(), nn.Conv2d(32, 24, 1, stride=2)), 24)  # fmt: skip


def dilated():
    return Head(nn.Sequential(nn.Conv2d(2, 24, 3, dilation=2, padding=1), nn.Tanh(),
                              nn.Conv2d(24, 40, 2, dilation=(2, 3))), 40)  # fmt: skip


def grouped():
    return Head(nn.Sequential(nn.Conv2d(2, 8, 3, groups=2), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8, padding=1),
                              nn.Tanh(), nn.Conv2d(8, 12, 1, groups=4)), 12)  # fmt: skip


def padded():
    return Head(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh(),
                              nn.Conv2d(4, 24, 4, padding="same"), nn.Tanh(), nn.Conv2d(24, 4, 1, padding=1),
                              nn.Tanh(), nn.Conv2d(4, 4, 3, padding="valid")), 4)  # fmt: skip


class Norms(nn.Module):
    """GroupNorm on maps, LayerNorm on tokens, BatchNorm on vectors, a one-dimensional convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6)
        self.layer, self.token = nn.LayerNorm(6), nn.Linear(6, 8)
        self.line = nn.Conv1d(8, 10, 3, stride=2, padding=1)
        self.layer2, self.batch, self.fc = nn.LayerNorm((10, 8)), nn.BatchNorm1d(10), nn.Linear(10, 3)
        self.batch.running_mean.uniform_(0.5, 1.5)
        for norm in (self.group, self.layer, self.layer2, self.batch):
            nn.init.normal_(norm.weight)

    def forward(self, x):
        x = self.group(self.conv(x)).tanh().flatten(2).transpose(1, 2)
        x = self.token(self.layer(x)).tanh().transpose(1, 2)
        return self.fc(self.batch(self.layer2(self.line(x)).tanh().mean(2)))


class Shared(nn.Module):
    """The same convolution on two sizes of map, and the same linear layer three times."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.linear = nn.Conv2d(2, 24, 3), nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 24)
        self.norm, self.fc = nn.BatchNorm2d(24), nn.Linear(24, 3)

    def forward(self, x):
        x = self.conv(self.norm(self.first(x)).tanh())
        x = F.avg_pool2d(self.norm(x).tanh(), 2)
        x = self.conv(x).tanh().mean((2, 3))
        for _ in range(3):
            x = self.linear(x).tanh()
        return self.fc(x)


class Tied(nn.Module):
    """Two modules with one weight, a weight that is used by a function, and a parameter of the network itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = (nn.Linear(72, 72), nn.Linear(72, 72), nn.Linear(72, 10), nn.Linear(10, 3))
        self.b.weight = self.a.weight
        self.scale, self.unused = nn.Parameter(torch.rand(10)), nn.Linear(3, 3)

    def forward(self, x):
        x = self.b(self.a(x.flatten(1)).tanh()).tanh()
        return self.fc(F.linear(x, self.c.weight, self.c.bias).tanh() * self.scale)


def weight_norm():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 8, 3))
    return Head(nn.Sequential(conv, nn.Tanh(), nn.Conv2d(8, 8, 3)), 8)


def old_weight_norm():
    conv = torch.nn.utils.weight_norm(nn.Conv2d(2, 8, 3))
    return Head(nn.Sequential(conv, nn.Tanh(), nn.Conv2d(8, 8, 3)), 8)


class Sequence(nn.Module):
    """Tokens first, samples second: the leading dimension of layers' inputs is not that of samples."""

    def __init__(self, tokens=4):
        super().__init__()
        self.tokens, self.inside, self.norm, self.fc = tokens, nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = x.flatten(1)[:, : 8 * self.tokens].reshape(len(x), self.tokens, 8).transpose(0, 1)
        return self.fc(self.norm(self.inside(x).tanh()).mean(0))


class Windows(nn.Module):
    """Windows of an image in the batch dimension, as in Swin."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 3)
        self.inside, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = self.conv(x)
        windows = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 4, 5, 1).reshape(-1, 9, 8)
        windows = self.norm(self.inside(windows)).tanh().reshape(len(x), 4, 9, 8)
        return self.fc(windows.mean((1, 2)))


class Attention(nn.Module):
    """torch's own attention and encoder layer, whose fast paths skip the layers inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        x = self.encoder(self.embed(x.flatten(1).reshape(len(x), 6, 12))).transpose(0, 1)
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(0))


class Renorm(nn.LayerNorm):
    """A LayerNorm of channels first, as in timm: the parent's formula does not hold."""

    def forward(self, x):
        return super().forward(x.transpose(1, 3)).transpose(1, 3)


def channels_first():
    return Head(nn.Sequential(nn.Conv2d(2, 6, 1), Renorm(6), nn.Tanh(), nn.Conv2d(6, 4, 3)), 4)


class Scaled(nn.Linear):
    """A linear layer with something after it."""

    def forward(self, x):
        return super().forward(x).mul(2).tanh()


def subclass():
    return nn.Sequential(nn.Flatten(), Scaled(72, 8), nn.Linear(8, 3))


class CubeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Custom(nn.Module):
    """An autograd function that vmap does not take, beside a parameter that needs torch.func."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(72, 3), nn.Parameter(torch.rand(3))

    def forward(self, x):
        return CubeFunction.apply(self.fc(x.flatten(1)) * self.scale)


MAKERS = {
    "mlp": mlp, "batchnorm": batchnorm, "pixel_gram": pixel_gram, "strided": strided, "dilated": dilated,
    "grouped": grouped, "padded": padded, "norms": Norms, "shared": Shared, "tied": Tied, "weight_norm": weight_norm,
    "old_weight_norm": old_weight_norm, "sequence": Sequence, "windows": Windows, "attention": Attention,
    "channels_first": channels_first, "subclass": subclass, "custom": Custom,
}  # fmt: skip


def make(name, seed=0):
    """Return a network by name, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MAKERS[name]().double().eval()


quiet = functools.partial(empirical_ntk, progress=False)
ROUTES = {  # what each network is there for
    "mlp": {"Gram"}, "batchnorm": {"J-dot"}, "pixel_gram": {"pixel Gram", "unfolded Gram"},
    "strided": {"unfolded Gram"}, "dilated": {"unfolded Gram"}, "grouped": {"J-dot"}, "shared": {"unfolded Gram"},
}  # fmt: skip
UNEXPLAINED = {
    "tied": {"a.weight", "c.weight", "c.bias", "scale"},
    "weight_norm": {f"body.0.parametrizations.weight.original{i}" for i in (0, 1)},
    "old_weight_norm": {"body.0.weight_g", "body.0.weight_v"},
    "sequence": {"inside.weight", "inside.bias", "norm.weight", "norm.bias"},
    "channels_first": {"body.1.weight", "body.1.bias"},
    "subclass": {"1.weight", "1.bias"},
    "custom": {"scale"},
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_output_equals_explicit_gradients(name, explicit, assert_equal):
    model, x, x2 = make(name), images(5), images(3, seed=1)
    every = explicit(model, x)
    assert_equal(quiet(model, x, outputs="all"), every)
    for outputs in (2, "class", "trace", "sum"):
        assert_equal(quiet(model, x, outputs=outputs), explicit(model, x, outputs=outputs))
        assert_equal(quiet(model, x, x2, outputs=outputs), explicit(model, x, x2, outputs=outputs))
    assert_equal(quiet(model, x, x2, outputs="all"), explicit(model, x, x2))


@pytest.mark.parametrize("name", ROUTES)
def test_the_routes_under_test_are_taken(name):
    found = {layer.route for layer in ntk_cost(make(name), images(5), outputs=0).layers}
    assert found >= ROUTES[name]


@pytest.mark.parametrize("outputs", [0, "class", "all"])
def test_a_layer_whose_gradients_need_more_room_than_its_inputs_keeps_the_latter(outputs, explicit, assert_equal):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wide().double()
    x, names = images(16), ["body.2.weight"]
    (layer,) = (c for c in ntk_cost(model, x, outputs=outputs, params=names).layers)
    assert layer.route == "J-dot"
    passes = 1 if outputs == 0 else 3
    assert layer.bytes == 8 * len(x) * 36 * (32 + passes * 32)  # its inputs and output gradients
    assert layer.bytes < 8 * len(x) * passes * 32 * 32 * 9  # not the gradients of single samples
    assert_equal(quiet(model, x, outputs=outputs, params=names), explicit(model, x, outputs=outputs, names=names))


@pytest.mark.parametrize("name", MAKERS)
def test_torch_func_takes_the_parameters_that_no_layer_explains_and_no_others(name):
    cost = ntk_cost(make(name), images(5), outputs=0)
    rest = {layer.name for layer in cost.layers if layer.route == "torch.func"}
    if name == "attention":
        assert rest >= {"attention.in_proj_weight", "encoder.self_attn.in_proj_weight"}
        assert not any(n.startswith(("embed", "fc", "encoder.linear", "encoder.norm")) for n in rest)
    else:
        assert rest == UNEXPLAINED.get(name, set())


def test_a_small_vision_transformer(explicit, assert_equal):
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=12, num_heads=2, num_classes=3
        )
    model, x = model.double().eval(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert_equal(quiet(model, x, outputs="all"), explicit(model, x))
    rest = {layer.name for layer in ntk_cost(model, x, outputs=0).layers if layer.route == "torch.func"}
    assert rest == {"cls_token", "pos_embed"}


def test_token_inputs(explicit, assert_equal):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Flatten(),
                              nn.Linear(20, 2)).double()  # fmt: skip
    tokens = torch.tensor([[0, 1, 1, 6], [2, 2, 2, 3], [5, 4, 1, 0]])
    assert_equal(quiet(model, tokens, outputs="all"), explicit(model, tokens))


def test_a_network_of_channels_last_weights(explicit, assert_equal):
    model, x = make("batchnorm").to(memory_format=torch.channels_last), images(4)
    assert_equal(quiet(model, x.to(memory_format=torch.channels_last), outputs="all"), explicit(model, x))


def test_rounding_in_float32_is_small(explicit):
    model, x = make("batchnorm"), images(5)
    found, truth = quiet(model.float(), x, outputs="trace"), explicit(model.double(), x, outputs="trace")
    assert found.dtype == torch.float32
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (quiet(model.bfloat16(), x, outputs="trace") - truth).abs().max() < 0.05 * truth.abs().max()
