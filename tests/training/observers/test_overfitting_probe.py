"""The label-free probe of robust overfitting: on a model that memorised its images, and inside a training run."""

import math
from types import SimpleNamespace

import pytest
import torch
import torchattacks

from at_extensions.analysis import local_dispersion
from at_extensions.attacks import PGD
from at_extensions.methods import PGDAT, Standard
from at_extensions.models import create_model
from at_extensions.training import OverfittingProbe, Trainer


def images(seed, n=24):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def memorising():
    """A network trained by PGD-AT on random labels until it is robust on these images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("small_cnn", 2, in_chans=1, width=16)
        x, y = images(0), torch.arange(24) % 2
        method = PGDAT(model, eps=0.05, alpha=0.03, steps=3)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(120):
            method(x, y).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


def attack(model):
    return PGD(model, 0.05, 0.0125, 10)


def test_memorised_images_raise_the_alarm_and_unseen_ones_do_not(memorising):
    found = OverfittingProbe(images(0), images(1), attack=attack).after_epoch(1, memorising, {})
    assert found["probe_success_train"] < 0.2 < found["probe_success_held_out"]
    assert found["probe_success_gap"] == found["probe_success_held_out"] - found["probe_success_train"]
    assert found["probe_alarm"] == 1
    same = OverfittingProbe(images(1), images(2), attack=attack).after_epoch(1, memorising, {})
    assert same["probe_alarm"] == 0


def test_rows_hold_what_local_dispersion_measures_at_the_models_own_predictions(memorising, untouched):
    x, held_out = images(0, 6), images(1, 8)
    probe = OverfittingProbe(x, held_out, attack=attack, starts=3, seed=2)
    with untouched(memorising):
        found = probe.after_epoch(1, memorising, {})
    memorising.eval()
    with torch.no_grad():
        y = memorising(held_out).argmax(1)
    direct = local_dispersion(memorising, attack(memorising), held_out, y, starts=3, seed=2)
    assert found["probe_dispersion_held_out"] == direct.mean
    assert found["probe_success_held_out"] == direct.success
    p, q = found["probe_success_train"], direct.success
    assert found["probe_success_gap_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 6 + q * (1 - q) / 8))


def test_a_run_logs_it_every_few_epochs_with_the_training_eps():
    model = create_model("small_cnn", 2, in_chans=1, width=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    probe = OverfittingProbe(images(0, 4), images(1, 4), every=2, starts=2)
    batches = [(images(3, 8), torch.arange(8) % 2)]
    history = Trainer(
        PGDAT(model, eps=0.05, alpha=0.03, steps=1), optimizer, epochs=3, observers=[probe], progress=False
    ).fit(batches)
    assert ["probe_alarm" in row for row in history.rows] == [False, True, False]
    assert probe.attack(model).eps == 0.05


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"train must lie in \[0, 1\]"):
        OverfittingProbe(2 * images(0) + 1, images(1))
    with pytest.raises(ValueError, match="starts must be at least 2"):
        OverfittingProbe(images(0), images(1), starts=1)
    model = create_model("small_cnn", 2, in_chans=1, width=2)
    probe = OverfittingProbe(images(0), images(1))
    with pytest.raises(ValueError, match="give OverfittingProbe an attack="):
        probe.begin(SimpleNamespace(method=Standard(model)))
    with pytest.warns(UserWarning, match="no random start"):
        OverfittingProbe(images(0, 2), images(1, 2), attack=lambda m: torchattacks.FGSM(m, 0.1), starts=2).after_epoch(
            1, model, {}
        )
