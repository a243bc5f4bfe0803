"""Layer criticality against a plain loop and closed forms; the model is left unchanged."""

import copy
import json
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import at_extensions as atx
from at_extensions.analysis import LayerCriticality, layer_criticality
from at_extensions.attacks import PGD, RandomStream, perturb

CLASSES = 5


def unsettle(model):
    """Give BatchNorm statistics, gains and zero-initialised tensors values of a trained network's kind."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in ("mean", "std"):
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            tensor.add_(0.3 * noise if "var" in name else 0.3 * (noise - 0.5))
    return model.eval()


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(4, 6, 3, stride=2)
        self.fc = nn.Linear(6 * 3 * 3, CLASSES)

    def forward(self, x):
        x = F.relu(self.conv1(x), inplace=True)
        x += self.conv2(x)
        x[:, :1].mul_(2)
        return self.fc(self.conv3(x).relu_().flatten(1))


class Block(nn.Module):
    """A residual block as networks write it: in place, the shortcut last."""

    def __init__(self, width, out):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(width, out, 1, bias=False) if width != out else nn.Sequential()

    def forward(self, x):
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.act(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.layer1, self.layer2 = nn.Sequential(Block(4, 4), Block(4, 6)), nn.Sequential(Block(6, 6))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.conv1(x))).mean((2, 3)))


class DependsOnData(Cnn):
    def forward(self, x):
        return super().forward(x) * (2 if x.mean() > 0.5 else 1)


class LeavesTorch(Cnn):
    def forward(self, x):
        return super().forward(x) * float(x.detach().numpy().max())


class OldFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class CustomFunction(Cnn):
    def forward(self, x):
        return super().forward(OldFunction.apply(x))


def own(kind):
    def fresh(seed):
        torch.manual_seed(seed)
        return kind()

    return fresh


def named(name, **kwargs):
    return lambda: atx.create_model(name, CLASSES, **kwargs), None


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 8, 8, 8)}
MODELS = {
    "cnn": (Cnn, own(Cnn), (3, 8, 8)),
    "custom_function": (CustomFunction, own(CustomFunction), (3, 8, 8)),
    "resnet": (ResNet, own(ResNet), (3, 8, 8)),
    "cifar_resnet": (*named("cifar_resnet18", width=4), (3, 32, 32)),
    "preact_resnet": (*named("preact_resnet18", width=4), (3, 32, 32)),
    "dm_wide_resnet": (*named("dm_wide_resnet_10_1"), (3, 32, 32)),
    "vit": (*named("vit_tiny_patch16_224", **VIT), (3, 32, 32)),
    "swin": (*named("swin_tiny_patch4_window7_224", **SWIN), (3, 32, 32)),
    "convnext": (*named("convnext_atto", **CONVNEXT), (3, 32, 32)),
}


def build(name, dtype=torch.float64, n=7):
    make, fresh, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = unsettle(make().to(dtype))
        images = torch.rand(n, *shape, dtype=dtype)
        labels = torch.randint(0, CLASSES, (n,))
    return model, images, labels, fresh


@pytest.fixture
def cnn():
    return build("cnn")


def plain_loop(model, images, labels, fresh, layers, trials=2, kind="cosine", seed=0):
    """Every layer, every trial, the whole network, by the definition."""
    net = copy.deepcopy(model).eval()
    trained = copy.deepcopy(net.state_dict())
    predict = lambda: torch.softmax(net(images), 1).detach().numpy()  # noqa: E731
    distance = {
        "cosine": scipy.spatial.distance.cosine,
        "js": lambda p, q: scipy.spatial.distance.jensenshannon(p, q, base=2) ** 2,
        "kl": lambda p, q: scipy.special.rel_entr(p, q).sum(),
    }[kind]
    p, values, accuracies = predict(), {}, {}
    for layer in layers:
        values[layer], accuracies[layer] = [], []
        for trial in range(trials):
            drawn = atx.fresh_like(model, seed + trial) if fresh is None else fresh(seed + trial)
            new = {k: v for k, v in drawn.state_dict().items() if k.startswith(f"{layer}.")}
            assert new
            net.load_state_dict(trained | new)
            q = predict()
            values[layer].append(float(np.mean([distance(a, b) for a, b in zip(p, q)])))
            accuracies[layer].append(float((q.argmax(1) == labels.numpy()).mean()))
    return values, accuracies


def same(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    for layer in expected:
        assert found[layer] == pytest.approx(expected[layer], abs=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_loop(name):
    model, images, labels, fresh = build(name)
    result = layer_criticality(model, images, labels, fresh=fresh, trials=2, batch_size=3)
    values, accuracies = plain_loop(model, images, labels, fresh, result.layers)
    same(result.values, values)
    same(result.accuracies, accuracies)
    assert result.layers == [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert result.whole == []
    assert max(result.mean.values()) > 1e-3


@pytest.mark.parametrize("kind", ["js", "kl"])
def test_other_divergences_equal_scipys(cnn, kind):
    model, images, labels, fresh = cnn
    result = layer_criticality(model, images, fresh=fresh, trials=2, divergence=kind)
    same(result.values, plain_loop(model, images, labels, fresh, result.layers, kind=kind)[0])
    assert result.accuracy_after is None


@pytest.mark.parametrize("kind", [DependsOnData, LeavesTorch])
def test_a_network_that_cannot_be_recorded_equals_the_plain_loop(kind):
    torch.manual_seed(100)
    model, images, labels = kind().double(), torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.zeros(6).long()
    images[3:] *= 0.5
    result = layer_criticality(model, images, labels, fresh=own(kind), trials=2, batch_size=3)
    halves = [plain_loop(model, part, labels[:3], own(kind), result.layers)[0] for part in images.split(3)]
    same(result.values, {n: [(a + b) / 2 for a, b in zip(halves[0][n], halves[1][n])] for n in result.layers})
    assert result.whole == result.layers


@pytest.mark.parametrize("name", ["cnn", "resnet", "vit"])
def test_numbers_do_not_depend_on_memory_limit_or_batch_size(name):
    model, images, _, fresh = build(name)
    run = lambda **options: layer_criticality(model, images, fresh=fresh, trials=2, **options)  # noqa: E731
    reference = run(batch_size=3)
    for limit in (0, 20_000, 200_000):
        assert run(batch_size=3, memory_limit=limit).values == reference.values
    assert set(run(batch_size=3, memory_limit=0).whole) >= set(reference.layers[1:])
    assert set(run(batch_size=3, memory_limit=20_000).whole) < set(reference.layers)
    for size in (1, 4, 100):
        same(run(batch_size=size).values, reference.values)


def test_single_precision_agrees_to_rounding():
    model, images, labels, fresh = build("resnet", torch.float32)
    for size in (2, 7):
        result = layer_criticality(model, images, fresh=fresh, trials=2, batch_size=size)
        same(result.values, plain_loop(model, images, labels, fresh, result.layers)[0], 1e-6)


def arithmetic(model, images, **options):
    with FlopCounterMode(display=False) as counter:
        layer_criticality(model, images, progress=False, **options)
    return counter.get_total_flops()


def test_only_operations_that_depend_on_the_layer_are_recomputed():
    model, images, _, fresh = build("resnet", torch.float32, n=6)
    pixels, chain = 64 * 6, ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]
    chain += ["layer1.1.shortcut", "layer2.0.conv1", "layer2.0.conv2", "fc"]
    cost = {n: 2 * model.get_submodule(n).weight.numel() * (6 if n == "fc" else pixels) for n in chain}
    beside = {("layer1.1.conv1", "layer1.1.shortcut"), ("layer1.1.conv2", "layer1.1.shortcut")}
    reached = [cost[later] for i, layer in enumerate(chain) for later in chain[i:] if (layer, later) not in beside]
    one, two = (arithmetic(model, images, fresh=fresh, batch_size=2, trials=trials) for trials in (1, 2))
    assert two - one == sum(reached)


def test_arithmetic_is_under_two_thirds_of_the_plain_loop():
    model, images, _, fresh = build("vit", torch.float32, n=24)
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        model(images)
    plain = (3 * 10 + 1) * whole.get_total_flops()
    assert arithmetic(model, images, fresh=fresh, batch_size=2) < plain / 1.6


def test_criticality_of_a_reset_to_the_same_weights_is_zero(cnn):
    model, images, labels, _ = cnn
    for kind in ("cosine", "js", "kl"):
        result = layer_criticality(model, images, labels, reset=model.state_dict(), divergence=kind)
        assert set(result.mean.values()) == {0.0}
        assert set(result.accuracy_after.values()) == {result.accuracy}


def two_layers():
    """Logits (ln 3, 0) on white: the second layer passes on what the first one makes of a pixel."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    net[1].weight.data = torch.tensor([[math.log(3)], [0.0]], dtype=torch.float64)
    net[2].weight.data = torch.eye(2, dtype=torch.float64)
    return net


def test_two_linear_layers_by_hand():
    white = torch.ones(4, 1, 1, 1, dtype=torch.float64)  # p = (3/4, 1/4), and (1/2, 1/2) once a layer is zero
    js = 0.5 * (0.75 * math.log2(0.75 / 0.625) + 0.25 * math.log2(0.25 / 0.375))
    js += 0.5 * (0.5 * math.log2(0.5 / 0.625) + 0.5 * math.log2(0.5 / 0.375))
    by_hand = {
        "cosine": 1 - 2 / math.sqrt(5),
        "kl": 0.75 * math.log(1.5) + 0.25 * math.log(0.5),
        "js": js,
    }
    for kind, expected in by_hand.items():
        result = layer_criticality(two_layers(), white, reset="zero", divergence=kind)
        assert result.mean == pytest.approx({"1": expected, "2": expected}, abs=1e-14)
        assert result.std == {"1": 0.0, "2": 0.0}
        assert result.interval["1"] == (result.mean["1"],) * 2
        assert result.trials == {"1": 1, "2": 1}


def test_trial_t_uses_seed_plus_t(cnn):
    model, images, _, fresh = cnn
    many = layer_criticality(model, images, fresh=fresh, trials=3, seed=5)
    for trial in range(3):
        one = layer_criticality(model, images, fresh=fresh, trials=1, seed=5 + trial)
        assert {name: values[trial] for name, values in many.values.items()} == {n: v[0] for n, v in one.values.items()}


def test_norm_matched_draws_have_the_trained_norm(cnn):
    model, images, labels, fresh = cnn

    def matched(seed):
        net = fresh(seed).double()
        for trained, drawn in zip(model.parameters(), net.parameters()):
            drawn.data *= trained.detach().norm() / drawn.detach().norm()
        return net

    result = layer_criticality(model, images, fresh=lambda s: fresh(s).double(), reset="norm_matched", trials=2)
    same(result.values, plain_loop(model, images, labels, matched, result.layers)[0])


def test_norm_matching_keeps_tensors_drawn_as_zero():
    model, images, _, _ = build("vit")  # timm draws a ViT's biases as zero
    assert all(math.isfinite(v) for v in layer_criticality(model, images, reset="norm_matched").mean.values())


def test_permuting_shuffles_each_tensor(cnn):
    model, images, _, _ = cnn
    for layer in ("conv1", "fc"):
        for tensor in model.get_submodule(layer).parameters():
            tensor.data.fill_(0.1)
    result = layer_criticality(model, images, reset="permute", trials=3)
    assert result.mean["conv1"] == result.mean["fc"] == 0
    assert len(set(result.values["conv2"])) == 3
    alone = layer_criticality(model, images, reset="permute", trials=3, layers=["conv2"])
    assert alone.values["conv2"] == result.values["conv2"]  # draws do not depend on what else is reset


def test_layers_by_predicate_include_their_buffers():
    model, images, labels, fresh = build("resnet")
    chosen = lambda name, module: isinstance(module, nn.BatchNorm2d)  # noqa: E731
    result = layer_criticality(model, images, fresh=fresh, layers=chosen, trials=2)
    assert result.layers == [n for n, m in model.named_modules() if chosen(n, m)]
    same(result.values, plain_loop(model, images, labels, fresh, result.layers)[0])


def test_layers_by_name_keep_the_given_order(cnn):
    model, images, labels, fresh = cnn
    result = layer_criticality(model, images, fresh=fresh, layers=["fc", "conv2"], trials=2)
    assert result.layers == ["fc", "conv2"]
    same(result.values, plain_loop(model, images, labels, fresh, ["fc", "conv2"])[0])


class Tied(nn.Module):
    """Two layers with one weight and a bias each, a layer that runs twice, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight
        self.again = self.twice
        self.idle, self.head = nn.Linear(3, 3), nn.Linear(12, CLASSES)
        self.third, self.fourth = nn.Linear(12, 12), nn.Linear(12, 12)
        self.fourth.weight.data = self.third.weight.data

    def forward(self, x):
        x = torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)))))
        x = torch.tanh(self.fourth(torch.tanh(self.third(x))))
        return self.head(torch.tanh(self.again(torch.tanh(self.twice(x)))))


def test_layers_that_share_tensors_are_reset_once_and_together():
    torch.manual_seed(100)
    torch.set_default_dtype(torch.float64)
    try:
        model, images = Tied(), torch.rand(5, 3, 2, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    labels = torch.arange(5)
    with pytest.warns(UserWarning, match="shares tensors"):
        result = layer_criticality(model, images, labels, fresh=own(Tied), trials=2)
    assert result.layers == ["first", "twice", "idle", "head", "third"]
    assert result.tied == {"first": ["second"], "twice": ["again"], "third": ["fourth"]}
    assert "= first shares tensors with second" in repr(result)
    assert result.mean["idle"] == 0
    assert result.accuracy_after["idle"] == result.accuracy
    both = copy.deepcopy(model)
    drawn = own(Tied)(0).double()
    pair = {k: v for k, v in drawn.state_dict().items() if k.startswith(("first.", "second."))}
    both.load_state_dict(model.state_dict() | pair)
    p, q = (torch.softmax(net(images), 1).detach().numpy() for net in (model, both))
    expected = np.mean([scipy.spatial.distance.cosine(a, b) for a, b in zip(p, q)])
    assert result.values["first"][0] == pytest.approx(expected, abs=1e-12)


def test_uint8_images_are_scaled(cnn):
    model, images, _, fresh = cnn
    pixels = (images * 255).round().byte()
    as_bytes = layer_criticality(model, pixels, fresh=fresh, trials=1, batch_size=2)
    as_floats = layer_criticality(model, pixels.double() / 255, fresh=fresh, trials=1, batch_size=2)
    assert as_bytes.values == as_floats.values


@pytest.mark.parametrize("given", [True, False])
def test_on_adversarial_images(untouched, given):
    model, images, labels, fresh = build("resnet")
    attack = PGD(model, eps=16 / 255, alpha=4 / 255, steps=3, start="uniform")
    with untouched(model):
        result = layer_criticality(
            model, images, labels if given else None, inputs=attack, fresh=fresh, trials=1, batch_size=3
        )
    targets = labels if given else model(images).argmax(1)
    examples = perturb(attack, images, targets, stream=RandomStream(0))
    expected = layer_criticality(model, examples, fresh=fresh, trials=1)
    same(result.values, expected.values, 1e-9)
    assert result.inputs == "PGD"
    clean = layer_criticality(model, images, fresh=fresh, trials=1)
    assert any(abs(result.mean[n] - clean.mean[n]) > 1e-4 for n in result.layers)


class Noisy(Cnn):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


def test_a_random_network_draws_the_same_numbers_in_every_pass(untouched):
    torch.manual_seed(100)
    model, images = Noisy().double().eval(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    with untouched(model):
        result = layer_criticality(model, images, reset=model.state_dict())
    assert set(result.mean.values()) == {0.0}
    assert result.whole == result.layers


class Remembers(Cnn):
    """Keeps something of each forward pass, as careless modules do."""

    def __init__(self):
        super().__init__()
        self.seen, self.last = 0, None
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.seen, self.last = self.seen + 1, x
        self.calls += 1
        return super().forward(x)


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Cnn, Remembers, DependsOnData])
def test_the_model_is_left_unchanged(untouched, kind, device):
    torch.manual_seed(100)
    model, images = kind().to(device), torch.rand(4, 3, 8, 8, device=device)
    model.train()
    model.conv2.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    images_before = images.clone()
    with untouched(model):
        result = layer_criticality(model, images, torch.zeros(4).long().to(device), fresh=own(kind), trials=2)
    assert torch.equal(images, images_before)
    assert result.values == layer_criticality(model.eval(), images, fresh=own(kind), trials=2).values
    assert vars(model).get("last") is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 9])
def test_the_model_is_restored_after_an_exception(untouched, stop, step, device):
    """Stopped in the first pass, while it is recorded, compared, or run whole."""
    torch.manual_seed(100)
    model, images = DependsOnData().train().to(device), torch.rand(4, 3, 8, 8, device=device)
    passes = iter(range(step - 1))

    def interrupt(*_):
        if next(passes, None) is None:
            raise stop

    model.conv2.register_forward_hook(interrupt)
    with untouched(model), pytest.raises(stop):
        layer_criticality(model, images, fresh=own(DependsOnData))


def test_compiled_models_keep_their_compiled_code():
    model, images, _, fresh = build("cnn")
    expected = layer_criticality(model, images, fresh=fresh, trials=1)
    wrapped = torch.compile(model, backend="eager")
    assert layer_criticality(wrapped, images, fresh=fresh, trials=1).values == expected.values
    model.compile(backend="eager")
    code = model._compiled_call_impl
    assert layer_criticality(model, images, fresh=fresh, trials=1).values == expected.values
    assert code is not None
    assert model._compiled_call_impl is code


def only_conv2_varies(seed):
    net = own(Cnn)(0)
    net.conv2 = own(Cnn)(seed).conv2
    return net.double()


def test_trials_are_added_until_intervals_are_narrow(cnn):
    model, images, _, _ = cnn
    first = layer_criticality(model, images, fresh=only_conv2_varies)
    low, high = first.interval["conv2"]
    width = (high - low) / 2
    result = layer_criticality(model, images, fresh=only_conv2_varies, ci_width=width, max_trials=200)
    assert [result.trials[n] for n in ("conv1", "conv3", "fc")] == [3, 3, 3]  # no spread: there after the first trials
    assert 3 < result.trials["conv2"] < 200
    assert result.unsettled == []
    low, high = result.interval["conv2"]
    assert high - low <= width
    assert result.values["conv2"][:3] == first.values["conv2"]
    fixed = layer_criticality(model, images, fresh=only_conv2_varies, trials=result.trials["conv2"])
    assert fixed.values["conv2"] == result.values["conv2"]


def test_max_trials_ends_the_measurement_and_wide_intervals_are_named(cnn):
    model, images, _, _ = cnn
    result = layer_criticality(model, images, fresh=only_conv2_varies, ci_width=1e-9, max_trials=5)
    assert result.trials == {"conv1": 3, "conv2": 5, "conv3": 3, "fc": 3}
    assert result.unsettled == ["conv2"]
    assert "conv2*" in repr(result)
    assert [row["settled"] for row in result.to_dict()["layers"]] == [True, False, True, True]


def test_intervals_are_students_t():
    values = {"a": [0.2, 0.3, 0.7, 0.4], "b": [0.999, 0.9, 0.95], "c": [0.5]}
    result = LayerCriticality(values)
    expected = scipy.stats.t.interval(0.95, 3, np.mean(values["a"]), scipy.stats.sem(values["a"]))
    assert result.interval["a"] == pytest.approx(expected, abs=1e-12)
    assert result.std["a"] == pytest.approx(np.std(values["a"], ddof=1))
    assert result.interval["b"][1] == 1.0  # criticality cannot be larger
    assert math.isnan(result.std["c"])
    assert all(math.isnan(end) for end in result.interval["c"])
    assert "unknown" in repr(result)


def test_stages():
    names = {
        "network.conv1": "conv1",
        "network.layer1.0.conv2": "layer1",
        "network.layer2.0.shortcut.0": "layer2",
        "network.stages.0.blocks.1.mlp.fc1": "stages.0",
        "network.features.denseblock1.denselayer2.conv1": "features.denseblock1",
        "network.features.3": "features",
        "network.blocks.11.attn.qkv": "blocks.11",
        "network.head.fc": "head",
    }
    result = LayerCriticality({name: [0.1 * i, 0.3 * i] for i, name in enumerate(names)}, wrapper="network.")
    assert {name: result.stage(name) for name in names} == names
    assert result.average == pytest.approx(np.mean([0.2 * i for i in range(8)]))
    two = LayerCriticality({"layer1.0.conv1": [0.2], "layer1.0.conv2": [0.4], "fc": [0.5]})
    assert two.by_stage() == pytest.approx({"layer1": 0.3, "fc": 0.5})


def test_wrappers_are_left_out_of_stages():
    model, images, _, _ = build("cifar_resnet", n=1)
    result = layer_criticality(model, images, trials=1)
    assert list(result.by_stage()) == ["conv1", "layer1", "layer2", "layer3", "layer4", "linear"]
    inner = layer_criticality(model.network, images, trials=1, fresh=lambda s: atx.fresh_like(model, s).network)
    assert inner.by_stage() == result.by_stage()


def test_results_go_through_json(cnn):
    model, images, labels, fresh = cnn
    for options in ({"trials": 1}, {"trials": 2, "ci_width": 0.01, "max_trials": 3}, {"reset": "zero"}):
        result = layer_criticality(model, images, labels, fresh=fresh, **options)
        text = json.dumps(result.to_dict(), allow_nan=False)
        back = LayerCriticality.from_dict(json.loads(text))
        assert repr(back) == repr(result)
        assert back.to_dict() == result.to_dict()


def test_table(cnn):
    model, images, labels, fresh = cnn
    result = layer_criticality(model, images, labels, fresh=fresh)
    head, title, *rows = repr(result).splitlines()
    assert f"average {100 * result.average:.2f}" in head
    assert title.split() == ["layer", "mean", "std", "95", "%", "interval", "trials", "accuracy", "after"]
    assert [row.split()[0] for row in rows] == result.layers
    assert rows[1].split()[1] == f"{100 * result.mean['conv2']:.2f}"


def wider(seed):
    net = own(Cnn)(seed)
    net.conv2 = nn.Conv2d(4, 8, 3, padding=1, groups=2)
    return net


BAD = {
    "an unknown layer": ({"layers": ["conv_1"]}, ValueError, "unknown layer 'conv_1'; did you mean 'conv1'"),
    "no such kind of layer": ({"layers": lambda n, m: False}, ValueError, "no layers to reset"),
    "a layer without weights": ({"layers": ["act"]}, ValueError, "has no weights"),
    "no recipe": ({}, ValueError, "pass fresh="),
    "fresh of other names": ({"fresh": lambda s: nn.Sequential(Cnn())}, ValueError, "lacks 8 of the model's tensors"),
    "fresh of another width": ({"fresh": wider}, ValueError, "another shape"),
    "fresh is a network": ({"fresh": Cnn()}, TypeError, "function seed -> module"),
    "fresh gives no network": ({"fresh": lambda s: s}, TypeError, "must return a torch.nn.Module"),
    "a foreign state dict": ({"reset": {"conv1.weight": torch.zeros(1)}}, ValueError, "lacks 7"),
    "an unknown reset": ({"reset": "randm"}, ValueError, "did you mean 'random'"),
    "an unknown divergence": ({"divergence": "l2"}, ValueError, "unknown divergence"),
    "no trials": ({"trials": 0}, ValueError, "trials must be at least 1"),
    "one trial for an interval": ({"trials": 1, "ci_width": 0.1}, ValueError, "trials must be at least 2"),
    "max_trials below trials": ({"ci_width": 0.1, "max_trials": 2}, ValueError, "max_trials must be at least 3"),
    "no width": ({"ci_width": 0.0}, ValueError, "ci_width must lie in"),
    "a negative seed": ({"seed": -1}, ValueError, "seed must be at least 0"),
    "no batch": ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
    "memory as a fraction": ({"memory_limit": 0.5}, TypeError, "memory_limit must be a whole number"),
    "labels out of range": ({"labels": torch.full((3,), CLASSES)}, ValueError, "labels must be class numbers"),
    "too few labels": ({"labels": torch.zeros(2).long()}, ValueError, "2 labels for 3 images"),
    "no images": ({"images": torch.rand(0, 3, 8, 8)}, ValueError, "images are empty"),
    "no pixels": ({"images": torch.zeros(0, 3, 8, 8).byte()}, TypeError, "floating point"),
    "normalised images": ({"images": torch.randn(3, 3, 8, 8)}, ValueError, "must lie in \\[0, 1\\]"),
    "one image": ({"images": torch.rand(3, 8, 8)}, ValueError, "must have shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, untouched):
    options, error, message = BAD[case]
    model = Cnn()
    model.act = nn.ReLU()
    images = options.get("images", torch.rand(3, 3, 8, 8))
    fresh = {} if case == "no recipe" else {"fresh": own(Cnn)}
    options = fresh | {k: v for k, v in options.items() if k != "images"}
    with untouched(model), pytest.raises(error, match=message):
        layer_criticality(model, images, **options)


def test_an_attack_on_another_model_is_refused(cnn):
    model, images, _, fresh = cnn
    with pytest.raises(ValueError, match="another model"):
        layer_criticality(model, images, fresh=fresh, inputs=PGD(copy.deepcopy(model)))


def test_trained_weights_given_as_fresh_ones_raise_a_warning(cnn):
    model, images, _, _ = cnn
    with pytest.warns(UserWarning, match="has the model's own weights"):
        result = layer_criticality(model, images, fresh=lambda seed: copy.deepcopy(model))
    assert set(result.mean.values()) == {0.0}


def test_logits_that_are_not_finite_name_the_layer(cnn):
    model, images, _, _ = cnn
    broken = {k: v.clone() for k, v in model.state_dict().items()}
    broken["conv3.bias"].fill_(float("nan"))
    with pytest.raises(ValueError, match="'conv3' reset"):
        layer_criticality(model, images, reset=broken)
    model.fc.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="the model's logits are not finite"):
        layer_criticality(model, images, reset="zero")


def test_probabilities_instead_of_logits_raise_a_warning(cnn):
    model, images, _, _ = cnn
    net = nn.Sequential(model, nn.Softmax(1))
    with pytest.warns(UserWarning, match="look like probabilities"):
        layer_criticality(net, images, reset="zero")


def test_outputs_that_are_not_logits_are_refused():
    class Two(Cnn):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="one tensor of logits"):
        layer_criticality(Two(), torch.rand(2, 3, 8, 8), fresh=own(Two))
