"""Properties of the empirical NTK, its memory, and what it refuses."""

import functools
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from at_extensions.analysis import empirical_ntk, ntk_cost
from at_extensions.analysis.ntk import _accumulator, _plan, _units

quiet = functools.partial(empirical_ntk, progress=False)


@pytest.fixture
def few_pixels():
    """A network with every route: gradients of single samples, and Gram matrices of pixels, windows and vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(2, 32, 2, stride=2), nn.BatchNorm2d(32), nn.Tanh(), nn.Conv2d(32, 32, 3, padding=1), nn.Tanh(),
            nn.Conv2d(32, 40, 2, stride=2), nn.Flatten(), nn.Tanh(), nn.Linear(40, 3),
        )  # fmt: skip
        net[1].running_mean.uniform_(0.5, 1.5)
    return net.double()


def two_layers():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        net[1].weight.copy_(torch.tensor([[1.0, 2.0]]))
    return net


X = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)


def test_a_linear_network_of_two_layers_by_hand():
    assert quiet(two_layers(), X, outputs=0).tolist() == [[7, 8], [8, 15]]


def test_biases_of_a_linear_network_by_hand():
    net = two_layers()
    net[0].bias, net[1].bias = (nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in (2, 1))
    assert quiet(net, X, outputs=0).tolist() == [[7 + 5 + 1, 8 + 5 + 1], [8 + 5 + 1, 15 + 5 + 1]]


@pytest.mark.parametrize("outputs", [1, "class", "trace", "sum", "all"])
def test_a_kernel_is_symmetric_to_the_bit_and_positive_semidefinite(few_pixels, batch, outputs):
    x, _ = batch(n=9, size=6, dtype=torch.float32)
    found = quiet(few_pixels.float(), x, outputs=outputs)
    flat = found.flatten(2).flatten(0, 1) if outputs == "all" else found
    assert torch.equal(flat, flat.mT)
    values = torch.linalg.eigvalsh(flat.double())
    assert (values >= -1e-6 * values.max()).all()


def test_trace_and_sum_follow_from_all(few_pixels, batch, assert_equal):
    x, _ = batch(n=4, size=6)
    every = quiet(few_pixels, x, outputs="all")
    assert_equal(quiet(few_pixels, x, outputs="trace"), torch.einsum("iaja->ij", every))
    assert_equal(quiet(few_pixels, x, outputs="sum"), every.sum((1, 3)))
    assert_equal(quiet(few_pixels, x, outputs="class"), torch.einsum("iaja->aij", every))


def test_kernels_of_parameter_groups_add_up(few_pixels, batch, assert_equal, explicit):
    x, _ = batch(n=4, size=6)
    first = quiet(few_pixels, x, outputs="trace", params=["0", "1.weight"])
    assert_equal(first, explicit(few_pixels.eval(), x, outputs="trace", names={"0.weight", "0.bias", "1.weight"}))
    others = quiet(
        few_pixels, x, outputs="trace", params=lambda name, p: name not in ("0.weight", "0.bias", "1.weight")
    )
    assert_equal(first + others, quiet(few_pixels, x, outputs="trace"))


def test_scaled_outputs_scale_the_kernel_by_the_square(few_pixels, batch, assert_equal):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = few_pixels

        def forward(self, x):
            return 3 * self.net(x)

    x, _ = batch(n=4, size=6)
    assert_equal(quiet(Scaled(), x, outputs=2), 9 * quiet(few_pixels, x, outputs=2))


@pytest.mark.parametrize("outputs", [0, "class", "all"])
def test_any_limit_and_block_size_gives_the_same_kernel(few_pixels, batch, assert_equal, monkeypatch, outputs):
    x, _ = batch(n=90, size=6)
    truth, roomy = quiet(few_pixels, x, outputs=outputs), ntk_cost(few_pixels, x, outputs=outputs)
    assert roomy.groups == 1
    groups = set()
    for limit in (roomy.least_bytes, roomy.least_bytes * 5 // 4, roomy.bytes):
        groups.add(ntk_cost(few_pixels, x, outputs=outputs, memory_limit=limit).groups)
        assert_equal(quiet(few_pixels, x, outputs=outputs, memory_limit=limit), truth)
    assert max(groups) > 1
    x, truth = x[:7], truth[:, :7, :7] if outputs == "class" else truth[:7, :7] if outputs == 0 else truth[:7, :, :7]
    for rows, cache, batch_size in ((1, 1, 1), (2, 10**5, 3), (5, 10**9, 4)):
        monkeypatch.setattr(_accumulator, "_ROWS", rows)
        monkeypatch.setattr(_units, "_CACHE", cache)
        monkeypatch.setattr(_plan, "_BATCH", batch_size)
        assert_equal(quiet(few_pixels, x, outputs=outputs), truth)
        assert_equal(quiet(few_pixels, x[:5], x[3:], outputs=outputs),
                     truth[:, :5, 3:] if outputs == "class" else truth[:5, ..., 3:] if outputs == 0
                     else truth[:5, :, 3:])  # fmt: skip


def test_parameters_for_torch_func_are_split_where_memory_asks(batch, assert_equal):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 16, 3))
        net = nn.Sequential(conv, nn.Tanh(), nn.Conv2d(16, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    x, _ = batch(n=40, size=6)
    cost = ntk_cost(net, x, outputs="class")
    small = ntk_cost(net, x, outputs="class", memory_limit=cost.least_bytes)
    assert cost.groups == 1
    assert small.groups > 3
    found = quiet(net, x, outputs="class", memory_limit=cost.least_bytes)
    assert_equal(found, quiet(net, x, outputs="class"))


MEASURE = """
import json, sys, torch
from pathlib import Path
from at_extensions.analysis import empirical_ntk, ntk_cost
from at_extensions.models import create_model
torch.set_num_threads(1)
status = lambda key: 1024 * next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines()
                                 if line.startswith(key + ":"))
model, x, found = create_model("cifar_resnet18", 3, width=12), torch.rand(40, 3, 32, 32), []
empirical_ntk(model, x[:2], outputs=0, progress=False)
for outputs, factor in ((0, 1), (0, 2), ("class", 2), ("class", 50)):
    limit = int(factor * ntk_cost(model, x, outputs=outputs).least_bytes)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    empirical_ntk(model, x, outputs=outputs, memory_limit=limit, progress=False)
    cost = ntk_cost(model, x, outputs=outputs, memory_limit=limit)
    found.append([cost.groups, limit, cost.bytes, status("VmHWM") - before])
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_measured_peak_of_memory_is_within_the_limit():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[0][0] > 1
    for _, limit, estimate, peak in found:
        assert peak <= estimate <= limit
    assert any(peak > estimate / 3 for _, _, estimate, peak in found)  # no empty bound


def test_the_model_is_left_untouched(small_net, batch, untouched):
    model, (x, _) = small_net(), batch()
    model[5].weight.grad = torch.ones_like(model[5].weight)
    model[0].weight.requires_grad_(False)
    model[1].register_forward_hook(lambda module, args, output: None)
    state = torch.backends.mha.get_fastpath_enabled()
    with untouched(model):
        quiet(model, x, outputs="class")
        quiet(model, x.float(), x[:2], outputs=0, dtype=torch.float32)
        quiet(model, x, outputs="trace", sketch=8)
        ntk_cost(model, x, outputs=1)
    with untouched(model), pytest.raises(ValueError, match="from 0 to 2"):
        quiet(model, x, outputs=3)
    assert torch.backends.mha.get_fastpath_enabled() == state


def test_frozen_parameters_are_left_out_unless_they_are_named(small_net, batch, assert_equal):
    model, (x, _) = small_net(train=False), batch()
    both = quiet(model, x, outputs=0)
    model[0].weight.requires_grad_(False)
    assert_equal(quiet(model, x, outputs=0) + quiet(model, x, outputs=0, params=["0.weight"]), both)


def test_works_inside_no_grad_inference_mode_and_autocast(small_net, batch, assert_equal):
    model, (x, _) = small_net(dtype=torch.float32), batch(dtype=torch.float32)
    truth = quiet(model, x, outputs=0)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(quiet(model, x, outputs=0), truth, 0)
    with torch.inference_mode():
        assert_equal(quiet(model, x.clone(), outputs=0), truth, 0)


def test_float64_computes_in_float64_on_float32_weights(small_net, batch, explicit, assert_equal):
    model, (x, _) = small_net(dtype=torch.float32, train=False), batch(dtype=torch.float32)
    found = quiet(model, x, outputs="all", dtype=torch.float64)
    assert model[0].weight.dtype == torch.float32
    assert found.dtype == torch.float64
    assert_equal(found, explicit(model.double(), x.double()))


def test_a_compiled_model_is_its_own(small_net, batch, assert_equal):
    model, (x, _) = small_net(train=False), batch()
    wrapped = torch.compile(model, backend="eager")
    assert_equal(quiet(wrapped, x, outputs=0, params=["5"]), quiet(model, x, outputs=0, params=["5"]), 0)


def test_sketches_are_unbiased_within_their_bound(few_pixels, batch):
    x, _ = batch(n=4, size=6)
    exact, sums, draws = quiet(few_pixels, x, outputs="trace"), 64, 60
    sketches = torch.stack([quiet(few_pixels, x, outputs="trace", sketch=sums, seed=s) for s in range(draws)])
    length = exact.diagonal().sqrt()
    scale = torch.outer(length, length)
    bound = ((1 + (exact / scale).square()) / sums).sqrt()
    errors = (sketches - exact) / scale
    assert (errors.mean(0).abs() < 4 * bound / math.sqrt(draws)).all()
    assert (errors.std(0) < bound * (1 + 4 / math.sqrt(2 * draws))).all()
    assert (errors.std(0) > bound / 4).any()
    assert torch.equal(sketches[0], sketches[0].T)


def test_sketches_of_both_sides_share_their_signs(few_pixels, batch, assert_equal):
    x, _ = batch(n=6, size=6)
    whole = quiet(few_pixels, x, outputs="class", sketch=32, seed=3)
    assert_equal(quiet(few_pixels, x[:4], x[2:], outputs="class", sketch=32, seed=3), whole[:, :4, 2:])
    assert not torch.equal(quiet(few_pixels, x, outputs="class", sketch=32, seed=4), whole)
    limit = 2**23
    assert_equal(quiet(few_pixels, x, outputs="class", sketch=32, seed=3, memory_limit=limit), whole)


def test_a_limit_that_cannot_hold_one_layer_names_the_least_that_can(few_pixels, batch):
    x, _ = batch(n=6, size=6)
    least = ntk_cost(few_pixels, x, outputs="class").least_bytes
    quiet(few_pixels, x, outputs="class", memory_limit=least)
    with pytest.raises(ValueError, match=f"at least {least} "):
        quiet(few_pixels, x, outputs="class", memory_limit=least - 1)
    with pytest.raises(ValueError, match="at least"):
        quiet(few_pixels, x, outputs="class", memory_limit=1000, sketch=8)


class Returns(nn.Module):
    """A linear layer with something done to its outputs."""

    def __init__(self, change):
        super().__init__()
        self.fc, self.change = nn.Linear(50, 3), change

    def forward(self, x):
        return self.change(self.fc(x.flatten(1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda y: (y, y), TypeError, "one tensor of outputs"),
        (lambda y: y.unsqueeze(2), ValueError, r"outputs \(B, K\); for one image it returned \(1, 3, 1\)"),
        (lambda y: y.sum(0, keepdim=True), ValueError, r"for 4 images it returned \(1, 3\)"),
        (lambda y: y / 0, ValueError, "not finite"),
        (lambda y: y - y.mean(0) + y.sum(0), ValueError, "depend on the other images"),
        (lambda y: y + torch.rand_like(y), ValueError, "depend on the other images of its batch, or on chance"),
        (lambda y: y.argmax(1), TypeError, "one tensor of outputs"),
    ],
)
def test_other_outputs_are_refused(batch, change, error, message):
    x, _ = batch(dtype=torch.float32)
    with pytest.raises(error, match=message):
        quiet(Returns(change), x, outputs=0)


def test_batch_statistics_are_refused(small_net, batch):
    model, (x, _) = small_net(), batch()
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(ValueError, match="BatchNorm with running statistics"):
        quiet(model, x, outputs=0)


def test_outputs_without_a_gradient_are_refused(batch):
    x, _ = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match="depend on no chosen parameter"):
        quiet(Returns(lambda y: y.detach()), x, outputs=0)


def test_control_flow_that_depends_on_inputs_is_refused(batch):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(50, 3), nn.Linear(50, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.a(x) if float(x.detach().max()) < 5 else self.b(x)

    x, _ = batch(n=80, dtype=torch.float32)
    x[1] *= 10
    with pytest.raises(ValueError, match="layers that the network calls depend on its inputs"):
        quiet(Branch(), x, outputs=0)


def test_bad_arguments_are_refused(small_net, batch):
    model, (x, _) = small_net(), batch()
    for options, error, message in (
        ({"outputs": "clas"}, ValueError, "did you mean 'class'"),
        ({"outputs": -1}, ValueError, "from 0"),
        ({"outputs": 3}, ValueError, "from 0 to 2"),
        ({"outputs": 1.0}, TypeError, "class number"),
        ({"x2": x[:, :1]}, ValueError, "one shape"),
        ({"x2": torch.full_like(x, math.nan)}, ValueError, "x2 holds values that are not finite"),
        ({"params": lambda name, p: False}, ValueError, "selects no parameter"),
        ({"params": ["6.weight"]}, ValueError, "unknown parameter or module '6.weight'"),
        ({"params": []}, ValueError, "selects no parameter"),
        ({"dtype": torch.int64}, TypeError, "floating-point type"),
        ({"sketch": 0}, ValueError, "sketch must be at least 1"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            quiet(model, x, **{"outputs": 0, **options})
    with pytest.raises(TypeError, match=r"images: x\.float\(\) / 255"):
        quiet(model, (255 * x).byte(), outputs=0)
    with pytest.raises(ValueError, match="not be empty"):
        quiet(model, x[:0], outputs=0)
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        quiet(model.requires_grad_(False), x, outputs=0)


def test_progress_is_shown_in_batches(small_net, batch, capsys):
    empirical_ntk(small_net(), batch()[0], outputs=0)
    assert "ntk 1/1 batches" in capsys.readouterr().err
