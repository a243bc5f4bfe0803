"""Curvature of the loss in the image: the largest eigenvalues of each sample's input Hessian."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from at_extensions.checks import check_count, check_images, check_labels, check_model, check_number, device_of
from at_extensions.untouched import frozen, twice_differentiable, untouched

_DENSE = 48  # pixels up to which the whole Hessian is formed


@dataclasses.dataclass(frozen=True, repr=False)
class InputCurvature:
    """Result of ``input_curvature``.

    Attributes:
        eigenvalues: (B, k) in float64 on the CPU, of each sample by falling magnitude.
    """

    eigenvalues: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of each sample (B,)."""
        return self.eigenvalues[:, 0].abs()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it."""
        return {"eigenvalues": self.eigenvalues.tolist(), "mean_largest": self.largest.mean().item()}

    def __repr__(self) -> str:
        low, median, high = torch.quantile(self.largest, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return (
            f"InputCurvature: {len(self.eigenvalues)} samples, largest |eigenvalue| of the input Hessian "
            f"{self.largest.mean().item():.4g} on average, median {median:.4g} (10 to 90 %: {low:.4g} to {high:.4g})"
        )


def input_curvature(
    model: nn.Module, x: Tensor, y: Tensor, *, k: int = 1, tol: float = 1e-4, seed: int = 0
) -> InputCurvature:
    """Return the k eigenvalues of largest magnitude, of either sign, of each sample's input Hessian.

    The Hessian is that of the cross-entropy of one sample in its own pixels, at the model in eval mode, so that no
    sample hides another. Hessian-vector products are exact (double backward); the eigenvalues are found by scipy's
    ``eigsh`` (ARPACK, implicitly restarted Lanczos), or from the whole Hessian of tiny images. Curvature jumps in
    catastrophic overfitting (arXiv 2206.08242). A network of ReLUs alone is curved by its softmax only.

    Cost: a forward pass and about 20 k backward passes of each sample by itself.

    Args:
        model: Classifier of images in [0, 1] that returns logits (B, K); it comes back as it was.
        x: Images (B, C, H, W), in the model's dtype.
        y: Class numbers (B,).
        k: Eigenvalues a sample, at most C H W.
        tol: Relative accuracy of the eigenvalues.
        seed: Of the starting vector.

    Raises:
        TypeError, ValueError: Images, labels or numbers that cannot be right.
        RuntimeError: The eigensolver did not converge on a sample.
    """
    check_images(x, values=False)
    check_labels(y, size=len(x))
    pixels = x[0].numel()
    if check_count("k", k) > pixels:
        raise ValueError(f"k must be at most the number of pixels, {pixels}, got {k}")
    check_number("tol", tol, at_least=0)
    device = device_of(check_model(model))
    start = np.random.default_rng(seed).standard_normal(pixels)
    found = []
    with untouched(model), frozen(model), twice_differentiable(model), torch.autocast(device.type, enabled=False):
        for number in range(len(x)):
            hessian = _Hessian(model, x[number : number + 1].to(device), y[number : number + 1].to(device).long())
            found.append(_eigenvalues(hessian, pixels, k, tol, start, number))
    return InputCurvature(torch.from_numpy(np.stack(found)))


class _Hessian:
    """Products with the input Hessian of one sample's cross-entropy; the forward pass is made once."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor):
        with torch.enable_grad():
            self._x = x.detach().clone().requires_grad_(True)
            logits = model(self._x)
            loss = nn.functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
            gradient = None
            if loss.requires_grad:
                gradient = torch.autograd.grad(loss, self._x, create_graph=True, allow_unused=True)[0]
        self._gradient = gradient if gradient is not None and gradient.requires_grad else None

    def __call__(self, v: np.ndarray) -> np.ndarray:
        if self._gradient is None:
            return np.zeros_like(v)
        vector = torch.from_numpy(np.asarray(v)).to(self._x).view_as(self._x)
        product = torch.autograd.grad(self._gradient, self._x, vector, retain_graph=True, allow_unused=True)[0]
        return np.zeros_like(v) if product is None else product.detach().cpu().double().flatten().numpy()


def _eigenvalues(hessian: _Hessian, n: int, k: int, tol: float, start: np.ndarray, number: int) -> np.ndarray:
    """Return the k eigenvalues of largest magnitude of a symmetric operator on n numbers."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if n <= _DENSE or 2 * k >= n:
        rows = np.stack([hessian(unit) for unit in np.eye(n)])
        values = np.linalg.eigvalsh((rows + rows.T) / 2)
    elif not np.any(hessian(start)):
        return np.zeros(k)
    else:
        operator = LinearOperator((n, n), matvec=lambda v: hessian(v.reshape(n)), dtype=np.float64)
        try:
            values = eigsh(operator, k=k, which="LM", v0=start, tol=tol, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            raise RuntimeError(
                f"the eigenvalues of sample {number} did not converge; give a larger tol than {tol:g}, or the model "
                "and the images in float64"
            ) from error
    return values[np.argsort(-np.abs(values))][:k].copy()
