"""The figure of a kernel in the course of training draws the numbers it is given."""

import pytest
import torch

from at_extensions.analysis import KernelEvolution
from at_extensions.publishing.kernel_plots import kernel_evolution


def found(epochs, by_class=True):
    n = len(epochs)
    distances = (torch.arange(n).view(-1, 1) - torch.arange(n)).abs() / 10
    return KernelEvolution(
        epochs=epochs,
        distances=distances,
        effective_rank=[2.0 + i for i in range(n)],
        top_mass=[0.5] * n,
        alignment=[0.1 * i for i in range(n)],
        specialization=[1.0 + i for i in range(n)] if by_class else None,
        spectra=torch.tensor([[0.7, 0.3, 0.0]] * n),
        kernels=torch.eye(3).repeat(n, 1, 1),
        outputs="class",
        perturbed=False,
    )


def test_measures_by_epoch():
    figure = kernel_evolution(found([5, 10, 20]))
    spectrum, matrix, rank, by_class = figure.axes[:4]
    assert [line.get_label() for line in spectrum.lines if "epoch" in line.get_label()] == ["epoch 5", "epoch 20"]
    assert spectrum.lines[0].get_ydata() == pytest.approx([0.7, 0.3])
    assert matrix.images[0].get_array()[0, 2] == pytest.approx(0.2)
    assert rank.lines[0].get_xydata().tolist() == [[5, 2], [10, 3], [20, 4]]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in by_class.lines}
    assert drawn["specialisation"] == [1, 2, 3]
    assert drawn["distance to the one before"] == pytest.approx([0.1, 0.1])


def test_a_single_checkpoint_and_one_without_specialisation():
    assert len(kernel_evolution(found([0])).axes) == 1
    by_class = kernel_evolution(found([1, 2], by_class=False)).axes[3]
    assert "specialisation" not in [line.get_label() for line in by_class.lines]
