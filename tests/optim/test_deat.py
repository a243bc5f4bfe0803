"""DEAT against the paper's recursion, PNM, plain SGD, and its own interrupted self."""

import copy
import io
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer import PNM
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from at_extensions.optim import DEAT

SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2))


def make_params(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def give_gradients(params, step, without=()):
    """Gradients that depend on the parameters and on the step; None for the parameters numbered in ``without``."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = None if i in without else (0.3 * p.detach().double() + noise).to(p.dtype)


def lr_at(step):
    return 0.3 / (1 + step % 7)


def values(params):
    return [p.detach().clone() for p in params]


def assert_bitwise(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_close(left, right, tolerance=1e-12):
    torch.testing.assert_close(list(left), list(right), rtol=tolerance, atol=tolerance)


# ---- the update


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("k1", "k2"), [(1.0, 0.8), (0.3, 0.55), (0.0, 0.9)])
def test_follows_the_papers_recursion(k1, k2, decoupled, foreach, tensor_lr):
    wd = 0.05
    params = make_params()
    lr = torch.tensor([0.1], dtype=torch.float64) if tensor_lr else 0.1
    optimizer = DEAT(params, lr, k1, k2, weight_decay=wd, decoupled=decoupled, foreach=foreach)
    theta = values(params)
    h = {-1: [torch.zeros_like(p) for p in theta], 0: [torch.zeros_like(p) for p in theta]}  # every h is kept
    for t in range(1, 51):
        give_gradients(params, t)
        a = lr_at(t)
        g = [p.grad + (0 if decoupled else wd * x) for p, x in zip(params, theta)]
        h[t] = [k2 * past + (1 - k2) * now for past, now in zip(h[t - 2], g)]
        scale = a / math.sqrt((1 + k1) ** 2 + k1**2)
        shrunk = [(1 - a * wd) * x if decoupled else x for x in theta]
        theta = [x - scale * ((1 + k1) * now - k1 * last) for x, now, last in zip(shrunk, h[t], h[t - 1])]
        if tensor_lr:
            lr.fill_(a)
        else:
            optimizer.param_groups[0]["lr"] = a
        optimizer.step()
        assert_close(params, theta)
    assert [optimizer.state[p].keys() for p in params] == [{"momentum_newer", "momentum_older"}] * len(params)


@pytest.mark.parametrize("decoupled", [False, True])
def test_is_pnm_at_beta1_sqrt_k2_and_beta2_k1(decoupled):
    k1, k2 = 0.7, 0.8
    ours, theirs = make_params(), make_params()
    optimizer = DEAT(ours, 0.1, k1, k2, weight_decay=0.05, decoupled=decoupled)
    reference = PNM(theirs, 0.1, betas=(math.sqrt(k2), k1), weight_decay=0.05, weight_decouple=decoupled)
    for t in range(50):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr_at(t)
        optimizer.step()
        reference.step()
        assert_close(ours, theirs)


@pytest.mark.parametrize("foreach", [False, True])
def test_without_momenta_it_is_plain_sgd_bit_for_bit(foreach):
    ours, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer = DEAT(ours, 0.1, k1=0.0, k2=0.0, weight_decay=0.01, foreach=foreach)
    reference = torch.optim.SGD(theirs, 0.1, weight_decay=0.01)
    for t in range(10):
        give_gradients(ours, t)
        give_gradients(theirs, t)
        optimizer.step()
        reference.step()
    assert_bitwise(ours, theirs)


@settings(max_examples=80, deadline=None)
@given(
    k1=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    k2=st.sampled_from([0.0, 0.5, 0.8, 0.99]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    maximize=st.booleans(),
    tensor_lr=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_foreach_equals_the_loop_bit_for_bit(k1, k2, weight_decay, decoupled, maximize, tensor_lr, dtype):
    runs = []
    for foreach in (False, True):
        params = make_params(dtype=dtype)
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        optimizer = DEAT(params, lr, k1, k2, weight_decay, decoupled, foreach, maximize)
        for t in range(5):
            give_gradients(params, t, without=(1,) if t == 2 else ())
            optimizer.step()
        runs.append(values(params))
    assert_bitwise(*runs)


def test_maximize_mirrors_minimising_the_negative():
    up, down = make_params(), make_params()
    ascend, descend = DEAT(up, 0.1, maximize=True, weight_decay=0.1), DEAT(down, 0.1, weight_decay=0.1)
    for t in range(5):
        give_gradients(up, t)
        for p, q in zip(up, down):
            q.grad = -p.grad
        ascend.step()
        descend.step()
    assert_bitwise(up, down)


def test_groups_have_their_own_options_devices_and_dtypes():
    together = [*make_params(1, torch.float32), *make_params(2, torch.float64)]
    first, second = make_params(1, torch.float32), make_params(2, torch.float64)
    joint = DEAT([{"params": together[:4]}, {"params": together[4:], "lr": 0.3, "k1": 0.2, "k2": 0.5}], lr=0.1)
    mixed = [*make_params(1, torch.float32), *make_params(2, torch.float64)]
    one_group = DEAT(mixed, lr=0.1, foreach=True)
    apart = [DEAT(first, 0.1), DEAT(second, 0.3, 0.2, 0.5)]
    plain = [*make_params(1, torch.float32), *make_params(2, torch.float64)]
    plain_optimizer = DEAT(plain, lr=0.1, foreach=False)
    for t in range(6):
        for params in (together[:4], together[4:], first, second, mixed[:4], mixed[4:], plain[:4], plain[4:]):
            give_gradients(params, t)
        for optimizer in (joint, *apart, one_group, plain_optimizer):
            optimizer.step()
    assert_bitwise(together, [*first, *second])
    assert_bitwise(mixed, plain)


# ---- what the paper's update amounts to


@settings(max_examples=30, deadline=None)
@given(k1=st.floats(0, 4), k2=st.floats(0, 0.95), steps=st.integers(1, 40))
def test_displacement_telescopes_to_the_sum_of_gradients(k1, k2, steps):
    params = make_params()
    start = values(params)
    optimizer = DEAT(params, 0.1, k1, k2)
    total = [torch.zeros_like(p) for p in start]
    for t in range(steps):
        give_gradients(params, t)
        for s, p in zip(total, params):
            s += p.grad
        optimizer.step()
    step = 0.1 / math.hypot(1 + k1, k1)
    for p, x, g in zip(params, start, total):  # what is left are the last two momenta alone
        last, before = optimizer.state[p]["momentum_newer"], optimizer.state[p]["momentum_older"]
        assert_close([p.detach() - x], [-step * (g - k2 / (1 - k2) * (last + before) + k1 * last)], 1e-10)


@pytest.mark.parametrize(("k1", "k2"), [(1.0, 0.8), (0.5, 0.5)])
def test_noise_variances_match_the_theory(k1, k2):
    generator = torch.Generator().manual_seed(0)
    size, burn_in, steps = 20_000, 60, 400
    param = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = DEAT([param], 1.0, k1, k2)
    for t in range(burn_in + steps):
        if t == burn_in:
            start = param.detach().clone()
        before = param.detach().clone()
        param.grad = torch.randn(size, generator=generator, dtype=torch.float64)
        optimizer.step()
    of_momentum = (1 - k2) / (1 + k2)
    assert optimizer.state[param]["momentum_newer"].var().item() == pytest.approx(of_momentum, rel=0.04)
    assert (param - before).var().item() == pytest.approx(of_momentum, rel=0.04)  # the scale a' is made for this
    long_run = (param - start).var().item() / steps
    assert long_run == pytest.approx(1 / ((1 + k1) ** 2 + k1**2), rel=0.06)


# ---- state


def run(optimizer, params, steps):
    for t in steps:
        give_gradients(params, t, without=(0,) if t % 5 == 1 else ())
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(dtype, at):
    whole = make_params(dtype=dtype)
    uninterrupted = DEAT(whole, 0.1, weight_decay=0.01)
    run(uninterrupted, whole, range(15))

    params = make_params(dtype=dtype)
    optimizer = DEAT(params, 0.1, weight_decay=0.01)
    run(optimizer, params, range(at))
    file = io.BytesIO()
    torch.save({"params": values(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = [nn.Parameter(p) for p in saved["params"]]
    again = DEAT(resumed, 0.5, k1=0.1)  # the state brings the options along
    again.load_state_dict(saved["optimizer"])
    run(again, resumed, range(at, 15))
    assert_bitwise(resumed, whole)
    for p, q in zip(resumed, whole):
        assert_bitwise(again.state[p].values(), uninterrupted.state[q].values())


def test_parity_is_counted_per_parameter():
    params = make_params()
    optimizer = DEAT(params, 0.1, weight_decay=0.1, decoupled=True)
    for t in range(9):
        give_gradients(params, t, without=(1,) if t in (2, 5, 6) else ())
        before = values(params)
        optimizer.step()
        if t in (2, 5, 6):
            assert torch.equal(params[1], before[1])  # no decay either
    alone = make_params()
    lone = DEAT([alone[1]], 0.1, weight_decay=0.1, decoupled=True)
    for t in (0, 1, 3, 4, 7, 8):
        give_gradients(alone, t)
        lone.step()
    assert_bitwise([params[1]], [alone[1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_momenta_of_low_precision_parameters_are_float32_also_after_loading(dtype):
    params = make_params(dtype=dtype)
    optimizer = DEAT(params, 0.1)
    run(optimizer, params, range(3))
    other = DEAT(make_params(dtype=dtype), 0.1)
    seen = []
    other.register_load_state_dict_post_hook(
        lambda o: seen.extend(h.dtype for s in o.state.values() for h in s.values())
    )
    other.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}
    for p, q in zip(params, other.param_groups[0]["params"]):
        assert_bitwise(optimizer.state[p].values(), other.state[q].values())
        assert not torch.equal(optimizer.state[p]["momentum_newer"].to(dtype).float(), other.state[q]["momentum_newer"])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_low_precision_parameters_are_rounded_once_a_step(decay, foreach):
    params = make_params(dtype=torch.bfloat16)
    optimizer = DEAT(params, 0.1, weight_decay=decay, decoupled=True, foreach=foreach)
    h = [[torch.zeros(p.shape), torch.zeros(p.shape)] for p in params]
    for t in range(6):
        give_gradients(params, t)
        expected = []
        for p, past in zip(params, h):
            now = 0.8 * past[-2] + 0.2 * p.grad.float()
            shrunk = p.detach().float() * (1 - 0.1 * decay)
            expected.append((shrunk - 0.1 / math.sqrt(5) * (2 * now - past[-1])).bfloat16())
            past.append(now)
        optimizer.step()
        torch.testing.assert_close(
            values(params), expected, rtol=2**-7, atol=1e-6
        )  # at most one unit in the last place
        same = [torch.eq(p, e).double().mean().item() for p, e in zip(params, expected)]
        assert sum(same) / len(same) > 0.9


def test_loaded_state_is_not_shared_with_the_state_it_came_from():
    params, twins = make_params(), make_params()
    optimizer, twin = DEAT(params, 0.1), DEAT(twins, 0.1)
    run(optimizer, params, range(3))
    twin.load_state_dict(optimizer.state_dict())
    before = [h.clone() for p in params for h in optimizer.state[p].values()]
    run(twin, twins, range(3, 6))
    assert_bitwise([h for p in params for h in optimizer.state[p].values()], before)


def test_hooks_on_loading_see_and_change_the_state():
    params = make_params()
    optimizer = DEAT(params, 0.1)
    run(optimizer, params, range(3))

    def rename(_, state_dict):
        state = {n: {k.removeprefix("old_"): v for k, v in s.items()} for n, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    saved = optimizer.state_dict()
    saved["state"] = {n: {f"old_{k}": v for k, v in s.items()} for n, s in saved["state"].items()}
    twins = make_params()
    twin = DEAT(twins, 0.1)
    twin.register_load_state_dict_pre_hook(rename)
    twin.load_state_dict(saved)
    assert_bitwise(twin.state[twins[0]].values(), optimizer.state[params[0]].values())
    assert len(twin._optimizer_load_state_dict_pre_hooks) == 1
    assert len(twin._optimizer_load_state_dict_post_hooks) == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_step_as_the_original(duplicate):
    params = make_params()
    optimizer = DEAT(params, 0.1)
    run(optimizer, params, range(3))
    twins, twin = duplicate((params, optimizer))
    run(optimizer, params, range(3, 6))
    run(twin, twins, range(3, 6))
    assert_bitwise(params, twins)


# ---- in other people's loops


def test_schedulers_warm_up_from_and_cool_down_to_zero():
    params, theirs = make_params(), make_params()
    optimizer, manual = DEAT(params, 0.2), DEAT(theirs, 0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: (0.0, 0.5, 1.0, 0.0)[epoch])
    for t, lr in enumerate((0.0, 0.1, 0.2, 0.0)):
        manual.param_groups[0]["lr"] = lr
        for each, leaves in ((optimizer, params), (manual, theirs)):
            give_gradients(leaves, t)
            before = values(leaves)
            each.step()
            if not lr:
                assert_bitwise(leaves, before)
        if t < 3:
            scheduler.step()
    assert_bitwise(params, theirs)
    again = DEAT(make_params(), 0.2)
    again.load_state_dict(optimizer.state_dict())  # also a state at the end of the schedule
    assert again.param_groups[0]["lr"] == 0


def test_one_cycle_moves_a_tensor_lr_in_place():
    params, theirs = make_params(), make_params()
    lr = torch.tensor(0.1, dtype=torch.float64)
    optimizer, reference = DEAT(params, lr), DEAT(theirs, 0.1)
    schedule = {"max_lr": 0.3, "total_steps": 10, "cycle_momentum": False}
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, **schedule) for o in (optimizer, reference)]
    for t in range(9):
        for each, leaves, scheduler in zip((optimizer, reference), (params, theirs), schedulers):
            give_gradients(leaves, t)
            each.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr
    assert_close(params, theirs, 1e-6)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    params, theirs = make_params(), make_params()
    optimizer, reference = DEAT(params, 0.1), DEAT(theirs, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(4):
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss.item() == pytest.approx(sum((q**2).sum().item() for q in theirs))
        for q in theirs:
            q.grad = 2 * q.detach()
        assert reference.step() is None
    assert_close(params, theirs)


def test_gradients_and_random_state_are_unchanged():
    for foreach, maximize in ((False, False), (True, False), (False, True), (True, True)):
        params = make_params()
        optimizer = DEAT(params, 0.1, weight_decay=0.1, foreach=foreach, maximize=maximize)
        give_gradients(params, 0)
        grads = [p.grad.clone() for p in params]
        random_state = torch.get_rng_state()
        optimizer.step()
        assert_bitwise([p.grad for p in params], grads)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(p.requires_grad and p.is_leaf for p in params)


def test_gradient_scaling_skips_overflowing_steps_and_cancels_out():
    params, theirs = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer, reference = DEAT(params, 0.1), DEAT(theirs, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for t in range(6):
        give_gradients(theirs, t)
        for p, q in zip(params, theirs):
            p.grad = q.grad * scaler.scale(torch.ones(()))
        if t == 3:
            params[0].grad[0, 0] = math.inf
        else:
            reference.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert_bitwise(params, theirs)  # a scale that is a power of two is exact; the skipped step kept the parity


@pytest.mark.parametrize(("foreach", "tensor_lr"), [(False, False), (True, True)])
def test_compiled_steps_equal_eager_ones(foreach, tensor_lr):
    torch._dynamo.reset()
    params, theirs = make_params(), make_params()
    lr = [torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1 for _ in range(2)]
    optimizer, reference = (
        DEAT([{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], a, foreach=foreach)
        for p, a in zip((params, theirs), lr)
    )
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")
    for t in range(10):
        for leaves in (params, theirs):
            give_gradients(leaves, t, without=(0,) if t in (3, 6) else ())  # so that parities differ within a group
        step()
        reference.step()
        if tensor_lr:
            for a in lr:
                a.fill_(lr_at(t))
        assert_close(params, theirs)
    torch._dynamo.reset()


RANK = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from at_extensions.optim import DEAT
from at_extensions.processes import disconnect

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
x, y = torch.randn(7, 8, 4).double(), torch.randint(3, (7, 8))
wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
optimizer = DEAT(wrapped.parameters(), 0.5, weight_decay=0.01)
for images, labels in zip(x[:, rank::2], y[:, rank::2]):
    optimizer.zero_grad(set_to_none=False)
    torch.nn.functional.cross_entropy(wrapped(images), labels).backward()
    optimizer.step()
torch.save(model.state_dict(), out)
del wrapped  # its threads end before the interpreter does: otherwise they may abort the process
disconnect()
"""


def test_two_distributed_ranks_equal_one_process_on_the_joint_batch(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(r), str(tmp_path / "store"), str(tmp_path / f"{r}.pt")], env=environment)
        for r in range(2)
    ]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(7, 8, 4).double(), torch.randint(3, (7, 8))
    optimizer = DEAT(model.parameters(), 0.5, weight_decay=0.01)
    for images, labels in zip(x, y):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for r in range(2):
        state = torch.load(tmp_path / f"{r}.pt", weights_only=True)
        assert_close(state.values(), model.state_dict().values())


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_no_value_from_the_device(foreach, dtype):
    with FakeTensorMode():  # here reading a value on the host raises
        params = [nn.Parameter(torch.zeros(s, device="cuda", dtype=dtype)) for s in SHAPES]
        for optimizer in (DEAT(params, 0.1, weight_decay=0.1, decoupled=d, foreach=foreach) for d in (False, True)):
            optimizer.param_groups[0]["lr"] = torch.zeros((), device="cuda")
            for _ in range(2):
                for p in params:
                    p.grad = torch.zeros_like(p)
                optimizer.step()
            assert {h.device.type for s in optimizer.state.values() for h in s.values()} == {"cuda"}
        with pytest.raises(Exception, match=r"aten\._local_scalar_dense"):
            params[0].sum().item()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0}, ValueError, r"lr must lie in \(0"),
        ({"lr": -0.1}, ValueError, r"lr must lie in \(0"),
        ({"lr": math.nan}, ValueError, r"lr must lie in \(0"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"lr": torch.tensor(-1.0)}, ValueError, r"lr must lie in \(0"),
        ({"lr": torch.ones(2)}, ValueError, "a tensor with one element"),
        ({"k1": -0.1}, ValueError, r"k1 must lie in \[0"),
        ({"k1": math.inf}, ValueError, r"k1 must lie in \[0"),
        ({"k2": 1.0}, ValueError, r"k2 must lie in \[0, 1\)"),
        ({"k2": -0.1}, ValueError, r"k2 must lie in \[0, 1\)"),
        ({"weight_decay": -1e-4}, ValueError, "weight_decay must lie in"),
    ],
)
def test_options_out_of_range_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        DEAT(make_params(), **{"lr": 0.1, **options})
    optimizer = DEAT(make_params(), lr=0.1)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": make_params(1), **options})
    assert len(optimizer.param_groups) == 1


def test_numpy_numbers_become_python_numbers_and_checkpoints_load_without_pickle():
    optimizer = DEAT(make_params(), np.float64(0.1), np.float32(1), np.int64(0), weight_decay=np.float64(1e-4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    group = torch.load(file, weights_only=True)["param_groups"][0]
    assert (group["lr"], group["k1"], group["k2"], group["weight_decay"]) == (0.1, 1, 0, 1e-4)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_complex_and_integer_parameters_are_refused(dtype):
    with pytest.raises(TypeError, match="real floating-point parameters"):
        DEAT([torch.zeros(3, dtype=dtype)], lr=0.1)


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = nn.Embedding(5, 3, sparse=True)
    params = make_params(dtype=torch.float32)
    optimizer = DEAT([{"params": params}, {"params": embedding.parameters()}], lr=0.1)
    give_gradients(params, 0)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = values([*params, embedding.weight])
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert_bitwise([*params, embedding.weight], before)
    assert not optimizer.state


def test_recording_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        param = nn.Parameter(torch.zeros(3, device="cuda"))
        param.grad = torch.zeros_like(param)
        with pytest.raises(RuntimeError, match="CUDA graph"):
            DEAT([param], lr=0.1).step()


def trained(make):
    params = make_params()
    optimizer = make(params)
    run(optimizer, params, range(3))
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: trained(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
            "not the state of a DEAT .* lacks 'decoupled'",
        ),
        (lambda: trained(lambda p: torch.optim.Adam(p, 0.1)), "not the state of a DEAT optimiser"),
        (lambda: trained(lambda p: PNM(p, 0.1)), "not the state of a DEAT optimiser"),
        (lambda: {"epoch": 3}, "no 'state' and 'param_groups'"),
        (lambda: {**trained(lambda p: DEAT(p, 0.1)), "state": {0: {"step": 1}}}, "a parameter has"),
        (lambda: trained(lambda p: DEAT(p[::-1], 0.1)), "for a parameter of shape"),
        (lambda: trained(lambda p: DEAT(p[:2], 0.1)), r"groups of sizes \[2\], the optimiser of \[4\]"),
    ],
)
def test_foreign_states_are_refused_before_anything_changes(state, message):
    params = make_params()
    optimizer = DEAT(params, 0.1)
    run(optimizer, params, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for n, s in before["state"].items():
        assert_bitwise(after["state"][n].values(), s.values())
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_a_state_can_be_loaded_again_and_again():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = DEAT([weight], lr=0.1)
    state = optimizer.state_dict()
    for _ in range(3):
        optimizer.load_state_dict(state)
