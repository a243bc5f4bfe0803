"""Local dispersion against its closed form on linear models, a slow loop, and its invariants."""

import itertools
import json
import math
import warnings

import pytest
import torch
import torchattacks
from torch import nn

from at_extensions.analysis import local_dispersion
from at_extensions.attacks import PGD

CLOSED_FORM = {  # a = steps alpha / eps -> E|d|, E d^2 and the mean shift of a coordinate, in units of eps
    0.5: (0.5625, 0.492188, 0.4375),
    1.0: (0.333333, 0.208333, 0.75),
    1.5: (0.104167, 0.033854, 0.9375),
    2.0: (0.0, 0.0, 1.0),
}


def linear(d=768, seed=0):
    """A linear model whose gradient has the same sign everywhere, and no weight of zero."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, 2, bias=False)).double()
    signs = torch.randint(0, 2, (d,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([signs, -signs]) / d)
    return net


def grey(n=24, side=16):
    return torch.full((n, 3, side, side), 0.5, dtype=torch.float64), torch.zeros(n, dtype=torch.long)


@pytest.mark.filterwarnings("ignore:.*less than the ball's diameter")
@pytest.mark.parametrize("a", CLOSED_FORM)
def test_linear_models_have_the_closed_form(a):
    model, (x, y), eps = linear(), grey(), 0.1
    attack = PGD(model, eps, eps / 4, round(4 * a))
    absolute, squared, mean = CLOSED_FORM[a]
    d = x[0].numel()
    found = local_dispersion(model, attack, x, y, norm=1)
    assert found.mean == pytest.approx(d * absolute * eps, abs=5 * found.stderr + 1e-9)
    euclidean = local_dispersion(model, attack, x, y, norm=2)
    assert euclidean.mean == pytest.approx(math.sqrt(d * squared) * eps, rel=0.01, abs=1e-9)
    # the mean of m starts keeps 1/m of the variance, which is half of E d^2
    expected = math.sqrt(d * (mean**2 + squared / 2 / found.starts)) * eps
    assert euclidean.shift == pytest.approx(expected, rel=0.01)
    if a == 2.0:
        assert found.mean == pytest.approx(0, abs=1e-9)
        assert found.saturated == pytest.approx(1)
        assert found.angle == pytest.approx(0, abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*less than the ball's diameter")
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_equals_a_slow_loop_over_pairs(small_net, batch, norm):
    model, (x, y) = small_net(train=False), batch(n=5)
    attack, starts = PGD(model, 0.1, 0.02, 3), 4
    found = local_dispersion(model, attack, x, y, starts=starts, norm=norm, seed=3, batch_size=5)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    ends = [attack.forward(x, y) for _ in range(starts)]
    torch.set_rng_state(state)
    for i in range(len(x)):
        pairs = list(itertools.combinations(range(starts), 2))
        distances = {p: (ends[p[0]][i] - ends[p[1]][i]).flatten().norm(p=norm).item() for p in pairs}
        assert found.per_sample[i].item() == pytest.approx(sum(distances.values()) / len(pairs))
        left_out = [
            sum(v for p, v in distances.items() if k not in p) / math.comb(starts - 1, 2) for k in range(starts)
        ]
        centre = sum(left_out) / starts
        jackknife = math.sqrt((starts - 1) / starts * sum((v - centre) ** 2 for v in left_out))
        assert found.per_sample_stderr[i].item() == pytest.approx(jackknife)
    cosines = [
        torch.cosine_similarity((a - x).flatten(1), (b - x).flatten(1)).tolist()
        for a, b in itertools.combinations(ends, 2)
    ]
    assert found.angle == pytest.approx(1 - sum(map(sum, cosines)) / (len(cosines) * len(x)))
    with torch.no_grad():
        wrong = [(model(end).argmax(1) != y).double().mean().item() for end in ends]
    assert found.success == pytest.approx(sum(wrong) / starts)
    assert found.stderr == pytest.approx(found.per_sample.std().item() / math.sqrt(len(x)))


def test_batches_of_another_size_measure_the_same_samples(small_net, batch):
    model, (x, y) = small_net(train=False), batch(n=6)
    attack = PGD(model, 0.05, 0.02, 5)
    whole, split = (local_dispersion(model, attack, x, y, starts=3, batch_size=size) for size in (6, 4))
    assert whole.per_sample.shape == split.per_sample.shape
    assert torch.equal(whole.per_sample, local_dispersion(model, attack, x, y, starts=3, batch_size=6).per_sample)


def test_grows_with_eps_and_stays_within_the_diameter(batch):
    model, (x, y) = linear(), grey(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [local_dispersion(model, PGD(model, eps, eps / 2, 1), x, y, starts=4) for eps in (0.05, 0.1, 0.2)]
    assert found[0].mean < found[1].mean < found[2].mean
    assert all(0 < f.relative < 1 for f in found)
    assert found[0].relative == pytest.approx(found[2].relative, rel=0.02)


@pytest.mark.parametrize("make", [lambda m: PGD(m, 0.1, 0.05, 4, start="zero"), lambda m: torchattacks.FGSM(m, 0.1)])
def test_attacks_without_a_random_start_warn_and_have_none(small_net, batch, make):
    model, (x, y) = small_net(train=False, dtype=torch.float32), batch(dtype=torch.float32)
    with pytest.warns(UserWarning, match="no random start"):
        found = local_dispersion(model, make(model), x, y, starts=3)
    assert found.mean == 0
    assert found.angle == pytest.approx(0, abs=1e-6)


def test_short_attacks_warn(small_net, batch):
    model, (x, y) = small_net(train=False), batch()
    with pytest.warns(UserWarning, match="less than the ball's diameter"):
        local_dispersion(model, PGD(model, 0.1, 0.01, 10), x, y, starts=2)


def test_the_model_is_left_untouched(small_net, batch, untouched):
    model, (x, y) = small_net(), batch()
    attack = PGD(model, 0.05, 0.05, 2)
    with untouched(model):
        found = local_dispersion(model, attack, x, y, starts=2)
    assert torch.isnan(found.per_sample_stderr).all()
    assert json.loads(json.dumps(found.to_dict()))["starts"] == 2
    assert "2 starts" in repr(found)


def test_bad_input_is_refused(small_net, batch):
    model, (x, y) = small_net(train=False), batch()
    attack = PGD(model, 0.05, 0.05, 2)
    with pytest.raises(ValueError, match="starts must be at least 2"):
        local_dispersion(model, attack, x, y, starts=1)
    with pytest.raises(ValueError, match=r"norm must be 1, 2 or math\.inf"):
        local_dispersion(model, attack, x, y, norm=3)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        local_dispersion(model, attack, 2 * x + 1, y)
    with pytest.raises(ValueError, match="attacks another model"):
        local_dispersion(model, PGD(small_net(1), 0.05, 0.05, 2), x, y)
