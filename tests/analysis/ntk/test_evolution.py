"""The kernel over kept epochs: measures against the kernels themselves, and what cannot be right."""

import json

import pytest
import torch
from torch import nn

from at_extensions.analysis import (
    effective_rank,
    empirical_ntk,
    kernel_distance,
    kernel_evolution,
    kernel_specialization,
    kernel_target_alignment,
    measure_kernels,
)
from at_extensions.attacks import PGD
from at_extensions.models import create_model, load_model
from at_extensions.runs import RunDirectory, save_weights

IMAGES = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


@pytest.fixture
def run(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    for epoch in (2, 4, 6):
        torch.manual_seed(epoch // 4)  # the first one differs from the others
        save_weights(create_model("small_cnn", 3, in_chans=1, width=2), directory.kept_path(epoch))
    return directory


def test_each_measure_is_that_of_the_epochs_kernel(run):
    found = kernel_evolution(run, IMAGES, LABELS, dtype=torch.float64, progress=False)
    assert found.epochs == [2, 4, 6]
    by_class = [empirical_ntk(load_model(path), IMAGES, outputs="class", dtype=torch.float64, progress=False)
                for path in run.kept().values()]  # fmt: skip
    for i, kernels in enumerate(by_class):
        trace = kernels.sum(0)
        assert torch.allclose(found.kernels[i], trace, rtol=1e-10)
        assert found.effective_rank[i] == pytest.approx(effective_rank(trace))
        assert found.alignment[i] == pytest.approx(kernel_target_alignment(trace, LABELS))
        assert found.specialization[i] == pytest.approx(kernel_specialization(kernels, LABELS))
        assert found.spectra[i].sum() == pytest.approx(1)
        assert (found.spectra[i].diff() <= 0).all()
    assert found.distances[0, 1] == pytest.approx(kernel_distance(*(k.sum(0) for k in by_class[:2])))
    assert torch.equal(found.distances, found.distances.T)
    assert found.velocity == pytest.approx([found.distances[0, 1].item(), 0.0], abs=1e-12)
    assert found.velocity[0] > 1e-4
    assert json.loads(json.dumps(found.to_dict()))["n_images"] == 12
    assert [line.split()[0] for line in repr(found).splitlines()[2:]] == ["2", "4", "6"]


def test_each_checkpoint_is_measured_on_its_own_adversarial_examples(run):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = kernel_evolution(run, IMAGES, LABELS, inputs=lambda m: PGD(m, 0.1, 0.05, 2), epochs=[4, 6], outputs="sum",
                             progress=False)  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    clean = kernel_evolution(run, IMAGES, epochs=[4, 6], outputs="sum", progress=False)
    assert clean.alignment is clean.specialization is found.specialization is None
    assert torch.equal(found.kernels[0], found.kernels[1])  # the same weights and the same random starts
    assert kernel_distance(found.kernels[0], clean.kernels[0]) > 1e-6
    assert found.perturbed
    assert not clean.perturbed


def test_a_single_model_comes_back_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure_kernels([(0, model)], IMAGES, LABELS, inputs=lambda m: PGD(m, 0.1, 0.05, 1))
    assert found.distances.tolist() == [[0.0]]
    assert found.velocity == []
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": [3]}, "has not kept epoch 3; it has 2, 4, 6"),
        ({"epochs": []}, "at least one epoch"),
        ({"epochs": [2, 2]}, "each once"),
        ({"outputs": "all"}, "outputs must be one of"),
        ({"labels": None, "inputs": PGD}, "need the images' labels"),
        ({"labels": torch.zeros(12).long()}, "no sample is of class 1"),
    ],
)
def test_bad_input_is_named(run, options, message):
    labels = options.pop("labels", LABELS)
    with pytest.raises(ValueError, match=message):
        kernel_evolution(run, IMAGES, labels, progress=False, **options)


def test_a_run_without_kept_epochs_is_told_how_to_keep_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="--keep-every"):
        kernel_evolution(tmp_path, IMAGES)
