"""The kernel while layers add to it: upper blocks of samples alone, mirrored at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from at_extensions.analysis.ntk._outputs import Outputs

_ROWS = 128  # of a block of samples; the share of a symmetric kernel that is computed twice is about _ROWS / N

Inner = Callable[[slice, slice], Tensor]


class Accumulator:
    """Sum of the layers' kernels.

    Args:
        outputs: The backward passes and their pairing.
        n: Samples of the rows.
        m: Samples of the columns; None for those of the rows, and a symmetric kernel.
        dtype: Of products and sums.
        device: Where they are computed.
    """

    def __init__(self, outputs: Outputs, n: int, m: int | None, dtype: torch.dtype, device: torch.device):
        self.n, self.m, self.symmetric = n, n if m is None else m, m is None
        self._passes, self._pairing = outputs.passes, outputs.pairing
        self._each = self._passes if self._pairing == "crossed" else 1  # rows of a sample
        layers = self._passes if self._pairing == "apart" else 1
        shape = (layers, self.n * self._each, self.m * self._each)
        self._sums = torch.zeros(shape, dtype=dtype, device=device)
        self.dtype = dtype

    @staticmethod
    def bytes(outputs: Outputs, n: int, m: int, dtype: torch.dtype) -> int:
        """Return the bytes of a kernel."""
        return outputs.pairs * n * m * dtype.itemsize

    def blocks(self, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
        """Yield pairs of sample ranges that cover the kernel, or a symmetric one's upper half."""
        for i in range(0, self.n, rows):
            for j in range(i if self.symmetric else 0, self.m, columns):
                yield slice(i, min(i + rows, self.n)), slice(j, min(j + columns, self.m))

    def add_rows(self, left: Tensor, right: Tensor) -> None:
        """Add the inner products of rows (N, A, p) and (M, A, p): gradients of single samples, or a part of them."""
        views = (self._merge(left), self._merge(right))
        for i, j in self.blocks(_ROWS, self.m):
            for sums, a, b in zip(self._sums, *views):
                a, b = a[self._span(i)].to(sums.dtype), b[self._span(j)].to(sums.dtype)
                sums[self._span(i), self._span(j)].addmm_(a, b.T)

    def _merge(self, rows: Tensor) -> Tensor:
        """Return rows (L, N', p') of the matrices that are summed."""
        if self._pairing == "apart":
            return rows.transpose(0, 1)
        if self._pairing == "merged":
            return rows.flatten(1).unsqueeze(0)
        return rows.flatten(0, 1).unsqueeze(0)

    def add_pixels(self, inputs: Inner, left: Tensor, right: Tensor, rows: int) -> None:
        """Add the products, summed over pairs of positions, of the inputs' and the output gradients' Gram matrices.

        Args:
            inputs: Ranges of samples to the Gram matrix of their inputs, (S, B, S, B').
            left: Output gradients (N, A, c_out, S).
            right: Those of the columns (M, A, c_out, S).
            rows: Samples of a block.
        """
        for i, j in self.blocks(rows, rows):
            gram, d, e = inputs(i, j), self._by_position(left[i]), self._by_position(right[j])
            if self._pairing == "crossed":
                shape = (i.stop - i.start, self._passes, j.stop - j.start, self._passes)
                block = self._sums[0, self._span(i), self._span(j)].view(shape)
                for a in range(self._passes):
                    for b in range(self._passes):
                        block[:, a, :, b] += _dot(gram, d[a], e[b])
            else:
                for sums, a, b in zip(self._sums, d, e):
                    sums[i, j] += _dot(gram, a, b)

    def _by_position(self, d: Tensor) -> Tensor:
        """Return output gradients (L, S, B, c): position first, so that sums over pairs of positions are contiguous."""
        d = d.to(self._sums.dtype)
        if self._pairing == "merged":
            d = d.flatten(1, 2).unsqueeze(1)
        return d.permute(1, 3, 0, 2)

    def _span(self, samples: slice) -> slice:
        return slice(samples.start * self._each, samples.stop * self._each)

    def result(self) -> Tensor:
        """Return the kernel on the CPU: (N, M), (A, N, M) or (N, A, M, A); mirrored in place if symmetric."""
        if self.symmetric:
            for sums in self._sums:
                _mirror(sums)
        if self._pairing == "crossed":
            return self._sums.view(self.n, self._passes, self.m, self._passes).cpu()
        return (self._sums if self._pairing == "apart" else self._sums[0]).cpu()


def _dot(gram: Tensor, d: Tensor, e: Tensor) -> Tensor:
    """Return the sum over s, t of gram[s, i, t, j] (d[s, i] . e[t, j]), (B, B')."""
    s, b, c = d.shape
    products = (d.reshape(s * b, c) @ e.reshape(-1, c).T).view(gram.shape)
    return products.mul_(gram).sum((0, 2))


def _mirror(matrix: Tensor, size: int = 1024) -> None:
    """Copy the upper triangle to the lower one, bit for bit."""
    for i in range(0, len(matrix), size):
        rows = slice(i, i + size)
        matrix[rows, rows] = matrix[rows, rows].triu() + matrix[rows, rows].triu(1).T
        matrix[i + size :, rows] = matrix[rows, i + size :].T


def block_rows(positions: int, limit: int, itemsize: int) -> int:
    """Return the samples of a block whose Gram matrices over positions stay within ``limit`` bytes; at least 1."""
    fits = math.isqrt(max(1, limit // (4 * itemsize)) // max(1, positions * positions))
    return max(1, min(fits, _ROWS))
