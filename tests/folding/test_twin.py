"""The folded twin computes what the model computes in eval mode, follows it, and leaves it alone."""

import copy
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from at_extensions.attacks import PGD, attacking
from at_extensions.folding import TwinWarning, fold_batchnorm
from at_extensions.models import create_model


def norms_in(model):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def double(model):
    """In float64, train mode, every BatchNorm with weights and statistics far from the identity."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.affine:
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.normal_(m.bias)
            if m.track_running_stats:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 1.5)
    return model.double().train()


def logits_and_gradient(f, x):
    x = x.clone().requires_grad_()
    logits = f(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits.double(), torch.arange(len(x)) % 2), x)[0]


def in_eval_mode(model):
    """The truth: the model itself, in eval mode while it is called."""

    def call(x):
        modes = {m: m.training for m in model.modules()}
        try:
            return model.eval()(x)
        finally:
            for module, mode in modes.items():
                module.training = mode

    return call


def train_a_little(model, x, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        F.cross_entropy(model(x), torch.arange(len(x)) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()


def images(n=3, channels=3, size=32, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def assert_twin_equals(twin, model, x, tolerance=1e-10):
    for ours, truth in zip(logits_and_gradient(twin, x), logits_and_gradient(in_eval_mode(model), x)):
        assert truth.abs().max() > 0
        torch.testing.assert_close(ours, truth, rtol=0, atol=tolerance * float(truth.abs().max().clamp(min=1)))


# --- every architecture, after training steps -------------------------------------------------------------------------

CIFAR = [  # name, options, BatchNorms that fold, BatchNorms
    ("cifar_resnet18", {"width": 4}, 20, 20),
    ("cifar_resnet50", {"width": 2}, 53, 53),
    ("preact_resnet18", {"width": 4}, 8, 17),
    ("wide_resnet_10_2", {}, 4, 7),
    ("wide_resnet_16_1", {}, 6, 13),
    ("dm_wide_resnet_10_1", {}, 3, 7),
    ("small_cnn", {"width": 8}, 4, 4),
]
TIMM = [
    ("resnet10t", {}, 14, 14),  # deep stem, average pooling in the shortcuts
    ("regnetx_002", {}, 44, 44),  # grouped convolutions, BatchNorm with its activation inside
    ("mobilenetv3_small_050", {}, 34, 34),  # depthwise convolutions, squeeze and excitation
    ("tf_mobilenetv3_small_minimal_100", {}, 34, 34),  # convolutions that pad as TensorFlow does
    ("densenet121", {"growth_rate": 4, "block_config": (2, 2, 2, 2)}, None, None),  # BatchNorm on concatenations
    ("ghostnet_050", {}, 80, 80),  # outputs used twice after their BatchNorm
]


@pytest.mark.parametrize(("name", "options", "folded", "norms"), CIFAR + TIMM, ids=[case[0] for case in CIFAR + TIMM])
def test_every_architecture_after_training_steps(name, options, folded, norms):
    torch.manual_seed(0)
    model = double(create_model(name, 3, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), **options))
    twin = fold_batchnorm(model)
    if folded is None:
        assert 0 < twin.folded < norms_in(model)
    else:
        assert (twin.folded, norms_in(model)) == (folded, norms)
    before = twin(images()).detach()
    train_a_little(model, images())
    twin.refresh()
    assert model.training
    assert not torch.allclose(twin(images()), before)
    assert_twin_equals(twin, model, images())


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_a_model_without_a_foldable_batchnorm_has_no_twin_and_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fold_batchnorm(create_model(name, 3)) is None


def test_twenty_steps_of_training_with_and_without_the_twin_give_the_same_weights():
    torch.manual_seed(0)
    plain = double(create_model("small_cnn", 3, width=4))
    twinned = copy.deepcopy(plain)
    twin = fold_batchnorm(twinned)
    x, y = images(8, size=8), torch.arange(8) % 3
    for model, attack in ((plain, PGD(plain, 0.1, 0.03, 3)), (twinned, PGD(twin, 0.1, 0.03, 3))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(20):
            twin.refresh()
            with attacking(attack.model):
                adversarial = attack.forward(x, y)
            F.cross_entropy(model(adversarial), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = twinned.state_dict()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-10)


# --- what folds, and what must not ------------------------------------------------------------------------------------


class Wired(nn.Module):
    """Two pairs of convolution and BatchNorm; ``wiring`` says how the first is used."""

    def __init__(self, wiring, conv=None, norm=None):
        super().__init__()
        self.conv1 = conv or nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = norm or nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.wiring = wiring

    def forward(self, x, scale=None):
        out = self.wiring(self, x)
        if scale is not None:
            out = out * scale
        return self.head(F.relu_(self.norm2(self.conv2(F.relu(out)))).mean((2, 3)))


def chained(net, x):
    return net.norm1(net.conv1(x))


def output_used_twice(net, x):
    out = net.conv1(x)
    return net.norm1(out) + out


def overwritten_in_between(net, x):
    out = net.conv1(x)
    out += 1
    return net.norm1(out)


def called_twice(net, x):
    return net.norm1(net.conv1(x)) + net.norm1(net.conv1(x.flip(3)))


def convolution_called_twice(net, x):
    return net.norm1(net.conv1(x)) + net.conv1(x.flip(3))


def weight_read_elsewhere(net, x):
    return net.norm1(net.conv1(x)) * net.conv1.weight.mean()


def statistics_read_elsewhere(net, x):
    return net.norm1(net.conv1(x)) + net.norm1.running_mean.mean()


@pytest.mark.parametrize(
    ("wiring", "folded"),
    [
        (chained, 2),
        (output_used_twice, 1),
        (overwritten_in_between, 1),
        (called_twice, 1),
        (convolution_called_twice, 1),
        (weight_read_elsewhere, 1),
        (statistics_read_elsewhere, 1),
    ],
)
def test_only_a_batchnorm_that_alone_sees_a_convolution_folds(wiring, folded):
    torch.manual_seed(0)
    model = double(Wired(wiring))
    twin = fold_batchnorm(model)
    assert twin.folded == folded
    train_a_little(model, images(size=6))
    assert_twin_equals(twin.refresh(), model, images(size=6))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Overridden(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).abs()


@pytest.mark.parametrize(
    ("conv", "norm", "folded"),
    [
        (lambda: nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False), 2),
        (lambda: nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, eps=0.1), 2),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.SyncBatchNorm(4), 2),
        (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.BatchNorm2d(4, momentum=None), 2),
        (lambda: nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False), 1),
        (lambda: nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), 1),
        (lambda: nn.Conv2d(3, 4, 3, padding=1), Overridden(4), 1),
        (lambda: Standardised(3, 4, 3), nn.BatchNorm2d(4), 1),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4), 1),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4), 1),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)), nn.BatchNorm2d(4), 1),
        (lambda: nn.ConvTranspose2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), 1),
    ],
)
def test_only_layers_whose_forward_is_known_fold(conv, norm, folded):
    torch.manual_seed(1)
    model = double(Wired(chained, conv(), norm))
    twin = fold_batchnorm(model)
    assert twin.folded == folded
    if not isinstance(norm, nn.SyncBatchNorm):  # which trains on GPUs alone
        train_a_little(model, images(size=6))
    assert_twin_equals(twin.refresh(), model, images(size=6))


def test_a_batchnorm_that_does_not_fold_has_the_same_first_and_second_derivatives():
    torch.manual_seed(0)
    model = double(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.BatchNorm2d(4), nn.Tanh()))
    twin, x = fold_batchnorm(model), images(2, size=4).requires_grad_()
    assert twin.folded == 1
    assert torch.autograd.gradcheck(twin, x)
    assert torch.autograd.gradgradcheck(twin, x)


def test_control_flow_in_a_head_without_batchnorm_does_not_stop_the_rest():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            if x.shape[-1] > 2:
                x = self.conv(x)
            return self.head(x.mean((2, 3)))

    model = double(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Head()))
    twin = fold_batchnorm(model)
    assert twin.folded == 1
    for size in (4, 8):
        assert_twin_equals(twin, model, images(size=size))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "wiring", lambda n, x: chained(n, x) if x.sum() > 0 else x), "TraceError"),
        (lambda m: setattr(m, "forward", lambda x: m.head(x.mean((2, 3)))), "forward was replaced"),
        (lambda m: setattr(m, "lock", (i for i in range(3))), "cannot pickle"),
    ],
    ids=["control flow", "replaced forward", "cannot be copied"],
)
def test_a_model_that_cannot_be_traced_or_copied_has_no_twin_and_one_warning(change, reason, untouched):
    model = Wired(chained)
    change(model)
    with untouched(model), pytest.warns(TwinWarning, match=f"Wired: .*{reason}"):
        assert fold_batchnorm(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fold_batchnorm(model) is None


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fold_batchnorm(lambda x: x)


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_hooks_are_honoured_and_their_modules_do_not_fold():
    torch.manual_seed(0)
    model = double(Wired(chained))
    seen = []
    model.conv1.register_forward_hook(lambda m, inputs, output: seen.append("conv1"))
    model.head.register_forward_pre_hook(lambda m, inputs: (2 * inputs[0],))
    twin = fold_batchnorm(model)
    assert not seen
    assert twin.folded == 1
    twin(images(size=6))
    assert seen == ["conv1"]
    assert_twin_equals(twin, model, images(size=6))


def test_nothing_folds_inside_or_across_a_container_that_is_hooked():
    def container_between(net, x):
        return net.norm1(net.container(x))

    torch.manual_seed(0)
    model = Wired(container_between)
    model.container = nn.Sequential(model.conv1)
    assert fold_batchnorm(double(model)).folded == 2
    seen = []
    model.container.register_forward_hook(lambda m, inputs, output: seen.append(output.detach()))
    twin = fold_batchnorm(model)
    assert not seen
    assert twin.folded == 1
    twin(images(size=6))
    torch.testing.assert_close(seen.pop(), model.conv1(images(size=6)).detach(), rtol=0, atol=1e-12)
    assert_twin_equals(twin, model, images(size=6))


def test_a_hook_that_comes_later_unfolds_its_pair_at_the_next_refresh():
    torch.manual_seed(0)
    model = double(Wired(chained))
    twin = fold_batchnorm(model)
    handle = model.norm1.register_forward_hook(lambda m, inputs, output: output + inputs[0])
    assert twin.refresh().folded == 1
    assert_twin_equals(twin, model, images(size=6))
    handle.remove()
    assert twin.refresh().folded == 2
    assert_twin_equals(twin, model, images(size=6))


@pytest.mark.parametrize("name", ["conv2", "head"])
def test_a_backward_hook_that_comes_later_fires_from_the_next_refresh_on(name):
    torch.manual_seed(0)
    model = double(Wired(chained))
    twin = fold_batchnorm(model)
    fired = []

    def tripled(module, grads, _):
        fired.append(module)
        return tuple(None if grad is None else 3 * grad for grad in grads)

    model.get_submodule(name).register_full_backward_hook(tripled)
    assert_twin_equals(twin.refresh(), model, images(size=6))
    assert len(fired) == 2


# --- the twin follows the model ---------------------------------------------------------------------------------------


def test_the_twin_follows_weights_that_are_replaced_and_modules_that_are_exchanged():
    torch.manual_seed(0)
    model, other = double(Wired(chained)), double(Wired(chained))
    twin = fold_batchnorm(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_twin_equals(twin.refresh(), other, images(size=6))
    model.head.weight = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    model.head.bias = nn.Parameter(torch.randn(5, dtype=torch.float64))
    assert_twin_equals(twin.refresh(), model, images(size=6))
    model.conv2 = nn.Conv2d(4, 4, 1, dtype=torch.float64)
    assert_twin_equals(twin.refresh(), model, images(size=6))


def without_bias(model):
    model.conv.bias = None


def with_another_bias(model):
    model.folded.bias = nn.Parameter(torch.ones(4, dtype=torch.float64))


def pruned(model):
    prune.l1_unstructured(model.conv, "weight", 0.5)


def with_old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.conv)


def with_new_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.conv)


def without_statistics(model):
    model.norm.running_mean = model.norm.running_var = None


@pytest.mark.parametrize(
    "change",
    [without_bias, with_another_bias, pruned, with_old_weight_norm, with_new_weight_norm, without_statistics],
)
def test_the_twin_follows_modules_whose_tensors_become_others(change):
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            folded=nn.Conv2d(3, 4, 3, bias=False),
            norm=nn.BatchNorm2d(4),
            conv=nn.Conv2d(4, 4, 3),
            flat=nn.Flatten(),
            head=nn.Linear(16, 2),
        )
    )
    twin = fold_batchnorm(double(model))
    change(model)
    assert_twin_equals(twin.refresh(), model, images(size=6))


def test_a_gradient_of_weights_that_are_gone_is_refused():
    torch.manual_seed(0)
    model = double(Wired(chained)).float()
    twin = fold_batchnorm(model)
    x = images(size=6, dtype=torch.float32).requires_grad_()
    out = twin(x).sum()
    model.conv1.weight.data.mul_(2)
    twin.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, x)


class Viewing(nn.Module):
    """Flattens its map by ``view``, which takes the usual layout alone."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(36 * width, 2)

    def forward(self, x):
        x = F.gelu(self.norm(self.conv1(x)))
        return self.head(F.gelu(self.conv2(x)).view(x.shape[0], -1))


@pytest.mark.parametrize("width", [4, 256])
@pytest.mark.parametrize("channels_last", [None, True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_model_that_views_its_maps_has_a_twin_in_its_own_layout(width, channels_last, autocast):
    torch.manual_seed(0)
    model = double(Viewing(width)).float()
    x = images(n=16, size=8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        twin = fold_batchnorm(model, channels_last=channels_last)
        truth = logits_and_gradient(in_eval_mode(model), x)[1]
        for _ in range(2):
            ours = logits_and_gradient(twin, x)[1]
            assert (ours - truth).norm() < (0.1 if autocast else 1e-4) * truth.norm()
            twin.refresh()
    assert twin.network.conv1.weight.dtype is (torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_weight_that_two_modules_hold_has_a_dtype_that_suits_both(first):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.norm(self.conv(x)).mean((2, 3))
            precise, other = (self.a, self.b) if first == "a" else (self.b, self.a)
            with torch.autocast("cpu", enabled=False):
                x = precise(x.float())
            return other(x)

    torch.manual_seed(0)
    model = double(Tied()).float()
    twin, x = fold_batchnorm(model), images(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        twin.refresh()
        truth = in_eval_mode(model)(x)
        torch.testing.assert_close(twin(x), truth, rtol=0.05, atol=0.05)
    assert twin.network.a.weight is twin.network.b.weight
    assert twin.network.a.weight.dtype is torch.float32


@pytest.mark.parametrize("width", [4, 192, 512])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_twin_that_was_built_or_called_in_inference_mode_gives_gradients_too(width, autocast):
    torch.manual_seed(0)
    layers = (nn.BatchNorm2d(3), nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.GELU())
    model = double(nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), nn.Flatten(), nn.LazyLinear(2)))
    x = images(n=4, size=4, dtype=torch.float32)
    model.float()(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.inference_mode():
            twin = fold_batchnorm(model)
            twin(x)
        truth = logits_and_gradient(in_eval_mode(model), x)[1]
        for _ in range(2):
            ours = logits_and_gradient(twin, x)[1]
            assert (ours - truth).norm() < (0.1 if autocast else 1e-4) * truth.norm()
            twin.refresh()


def test_transforms_see_through_a_twin():
    torch.manual_seed(0)
    model = double(Wired(chained)).float().eval()
    twin = fold_batchnorm(model)
    x, v = images(size=6, dtype=torch.float32), images(size=6, dtype=torch.float32).flip(3)
    for f in (
        lambda network: torch.func.grad(lambda x: network(x).square().sum())(x),
        lambda network: torch.func.jvp(network, (x,), (v,))[1],
        lambda network: torch.func.vmap(lambda x: network(x[None]))(x),
        lambda network: torch.func.vmap(torch.func.grad(lambda x: network(x[None]).square().sum()))(x),
    ):
        torch.testing.assert_close(f(twin), f(model), rtol=1e-4, atol=1e-5)


def test_the_twin_follows_mean_and_std():
    torch.manual_seed(0)
    model = double(create_model("small_cnn", 3, width=4))
    twin = fold_batchnorm(model)
    for mean, std in ((0, 1), (0.5, 1), (0, 2), (0, 1)):
        model.mean.fill_(mean), model.std.fill_(std)
        assert_twin_equals(twin.refresh(), model, images(size=8))


def test_the_twin_follows_dtype_layout_and_autocast_and_never_writes_into_the_models_memory():
    torch.manual_seed(0)
    model = double(Wired(output_used_twice))  # so that one convolution folds and one does not
    twin = fold_batchnorm(model)
    held, copied = [], []
    for dtype, layout, autocast in [
        (torch.float64, torch.channels_last, False),
        (torch.float32, torch.contiguous_format, False),
        (torch.float32, torch.contiguous_format, True),
        (torch.float32, torch.channels_last, True),
        (torch.float64, torch.contiguous_format, True),
        (torch.float32, torch.channels_last, False),
        (torch.float32, torch.contiguous_format, False),
    ]:
        model.to(dtype=dtype, memory_format=layout)
        model.conv1.weight = nn.Parameter(model.conv1.weight.detach() + 0.01)
        held += model.state_dict().values()  # the very memory, also once the model has left it
        copied += [tensor.clone() for tensor in model.state_dict().values()]
        x = images(size=6, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            twin.refresh()
            truth = in_eval_mode(model)(x)
            assert twin(x).dtype == truth.dtype
            tolerance = 0.05 if truth.dtype is torch.bfloat16 else 1e-5 if dtype is torch.float32 else 1e-10
            torch.testing.assert_close(twin(x), truth, rtol=tolerance, atol=tolerance)
        assert all(torch.equal(a, b) for a, b in zip(held, copied))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_a_model_in_bfloat16_are_rounded_once(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3, bias=bias), nn.BatchNorm2d(64))
    norm = model[1]
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 2)
    model.to(torch.bfloat16)
    folded = fold_batchnorm(model).network[0]
    truth = copy.deepcopy(model).double()
    expected = nn.utils.fuse_conv_bn_eval(truth[0].eval(), truth[1].eval())
    half_a_digit = 2**-8 * (1 + 1e-5)  # of the largest numbers between two powers of two
    for ours, theirs in ((folded.weight, expected.weight), (folded.bias, expected.bias)):
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=half_a_digit, atol=1e-6)


def test_under_autocast_the_twin_equals_autocast_on_the_same_folded_weights_bit_for_bit():
    torch.manual_seed(0)
    model = double(Wired(chained)).float()
    twin, x = fold_batchnorm(model), images(size=6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        truth = logits_and_gradient(twin, x)  # float32 weights, cast on the way
        outside = twin.refresh()
        assert twin.network.conv1.weight.dtype is torch.bfloat16
        lowered = logits_and_gradient(twin, x)
    # the first call ran in float32, as the twin was refreshed outside of autocast
    assert truth[0].dtype is torch.float32
    assert lowered[0].dtype is torch.bfloat16
    reference = copy.deepcopy(outside.network).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits_and_gradient(lambda x: reference(x.contiguous(memory_format=torch.channels_last)), x)
    assert torch.equal(lowered[0], expected[0])
    assert torch.equal(lowered[1], expected[1])


def test_a_layer_that_the_model_keeps_in_full_precision_stays_there():
    def full_precision(net, x):
        with torch.autocast("cpu", enabled=False):
            return net.norm1(net.conv1(x.float()))

    torch.manual_seed(0)
    model = double(Wired(full_precision)).float()
    with torch.autocast("cpu", torch.bfloat16):
        twin = fold_batchnorm(model)
        assert twin.folded == 2
        assert twin.network.conv1.weight.dtype is torch.float32
        assert twin.network.conv2.weight.dtype is torch.bfloat16
        x = images(size=6, dtype=torch.float32)
        torch.testing.assert_close(twin(x), in_eval_mode(model)(x), rtol=0.05, atol=0.05)


def test_refresh_allocates_no_weights_anew_and_never_waits_for_the_device(no_host_sync):
    model = Wired(chained)
    x = images(size=6, dtype=torch.float32)
    twin = fold_batchnorm(model)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            twin.refresh()
            memory = {name: p.data_ptr() for name, p in twin.named_parameters()}
            with no_host_sync():
                twin.refresh()
                torch.autograd.grad(twin(x.requires_grad_()).sum(), x)
            assert {name: p.data_ptr() for name, p in twin.named_parameters()} == memory


@pytest.mark.parametrize("channels_last", [None, True, False])
def test_the_gradient_has_the_layout_of_the_images(channels_last):
    torch.manual_seed(0)
    model = double(Wired(chained))
    twin = fold_batchnorm(model, channels_last=channels_last)
    assert twin.network.conv2.weight.is_contiguous(memory_format=torch.channels_last) == (channels_last is not False)
    assert_twin_equals(twin, model, images(size=6))
    assert logits_and_gradient(twin, images(size=6))[1].is_contiguous()


# --- the model is left alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_folding_refreshing_and_attacking_leave_the_model_as_it_was(train, untouched):
    def noisy(net, x):  # draws random numbers, counts its calls, and keeps its last output
        net.calls += 1
        net.last = net.norm1(net.conv1(x)) + torch.randn(()) * 0
        return net.last

    torch.manual_seed(0)
    model = double(Wired(noisy)).train(train)
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    model.norm2.eval()
    model.head.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    with untouched(model):
        twin = fold_batchnorm(model)
        twin.refresh()
    keys = list(model.state_dict())
    x = images(size=6).requires_grad_()
    with untouched(model, but=("buffers", "torch's random state")):  # as the model's own forward would
        torch.autograd.grad(twin(x).sum(), x)
    assert model.calls == 1
    assert list(model.state_dict()) == keys
    assert not any(p.requires_grad for p in twin.parameters())
    assert not any(m.training for m in twin.train().modules())


def test_the_model_and_its_twin_can_be_copied_and_pickled():
    torch.manual_seed(0)
    model = double(create_model("small_cnn", 3, width=4))
    twin = fold_batchnorm(model)
    again = pickle.loads(pickle.dumps(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    other = copy.deepcopy(twin)
    with torch.no_grad():
        model.network.classifier.weight.mul_(2)
    assert_twin_equals(twin.refresh(), model, images(size=8))
    assert_twin_equals(other.refresh(), again, images(size=8))


def test_a_model_with_old_style_weight_norm_after_a_forward_is_copied_too():
    torch.manual_seed(0)
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    model = double(Wired(chained, conv))
    train_a_little(model, images(size=6))  # leaves a weight with a graph on the module
    twin = fold_batchnorm(model)
    assert twin.folded == 1
    train_a_little(model, images(size=6))
    assert_twin_equals(twin.refresh(), model, images(size=6))
