"""The empirical neural tangent kernel of a network, exact and within a memory limit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from at_extensions.analysis.ntk._outputs import check_outputs
from at_extensions.analysis.ntk._passes import Network
from at_extensions.analysis.ntk._plan import Sizes, make_plan, make_sketch_plan
from at_extensions.analysis.ntk._probe import SAMPLES, probe
from at_extensions.analysis.ntk._run import Run, work_dtype
from at_extensions.checks import check_count, check_model, device_of, unknown_name
from at_extensions.untouched import isolated, untouched

Predicate = Callable[[str, nn.Parameter], bool]


def empirical_ntk(
    model: nn.Module,
    x: Tensor,
    x2: Tensor | None = None,
    *,
    outputs: int | str,
    memory_limit: int = 4 * 2**30,
    params: Predicate | Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    sketch: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Return the kernel of inner products of a network's parameter gradients, the empirical NTK.

        K_ab(x, x') = <d f_a(x) / d theta, d f_b(x') / d theta>

    with the outputs f (logits) in eval mode. It is exact for any network, up to the rounding of ``dtype``: one forward
    pass, and one backward pass through activations alone for each output, give the inputs and output gradients of all
    linear layers, convolutions and normalisations, and each layer adds its part by the route of fewest operations:
    gradients of single samples, or, where there are few positions, the product of the inputs' and of the output
    gradients' Gram matrices. Parameters whose gradients do not follow from one layer's input and output (class tokens,
    parametrised, tied or functionally used weights) are found by a comparison with an ordinary gradient and left to
    ``torch.func``. ``ntk_cost`` lists routes, operations and bytes before anything runs.

    A symmetric kernel (without ``x2``) is symmetric to the last bit. In float32, a ReLU whose input is almost 0 can
    open in a batch of one size and not in another, which moves single rows by about 1e-3; float64 makes that rare.

    Args:
        model: Network whose outputs are (B, K), of images or other inputs; measured in eval mode and left as it was. An
            image's outputs must not depend on its batch.
        x: Inputs (N, ...), on any device; cast to the type of the network.
        x2: Inputs (M, ...) of the kernel's columns; None for ``x``.
        outputs: A class number: the kernel of that logit, (N, M). ``"class"``: of each logit, (K, N, M). ``"trace"``:
            their sum, (N, M). ``"sum"``: the kernel of the sum of logits, (N, M), which is K times the pseudo-NTK of
            Mohamadi et al. (arXiv 2206.12543). ``"all"``: all pairs of logits, (N, K, M, K).
        memory_limit: Bytes beyond model and inputs, the kernel included. Layers are processed in groups that fit, and
            each group costs passes over all inputs.
        params: theta: names of parameters or of modules that hold them, or a predicate ``(name, parameter) -> bool``;
            None for all that require a gradient.
        dtype: Floating-point type of the computation, such as ``torch.float64``; the model's own if None, with sums in
            at least float32.
        sketch: Replace gradients by count sketches of this many sums: unbiased, with a standard deviation of at most
            ``sqrt((1 + rho^2) / sketch)`` of ``|g| |g'|``, rho being their cosine. It costs additions for each entry of
            each gradient, where the exact kernel costs products of pairs, and pays for thousands of inputs.
        seed: Of the sketch.
        progress: Show progress: a bar on a terminal, else lines.

    Returns:
        The kernel on the CPU, in ``dtype``, or the model's type and at least float32.

    Raises:
        TypeError: An argument of the wrong kind, or outputs that are not a tensor.
        ValueError: No inputs, or inputs that are not finite; ``x2`` of another shape; a class out of range; no or
            unknown parameters; outputs that are not (B, K), not finite, or depend on the batch; a limit that cannot
            hold one layer at a time.
    """
    model = getattr(check_model(model), "_orig_mod", model)  # torch.compile's wrapper
    outputs = check_outputs(outputs)
    check_inputs(x, x2)
    check_count("memory_limit", memory_limit)
    check_count("seed", seed, at_least=0)
    if sketch is not None:
        check_count("sketch", sketch)
    chosen = choose_parameters(model, params)
    with measuring(model, check_dtype(dtype)) as network:
        found = probe(network, network.batch(samples_of(x, x2)), outputs, chosen)
        sizes = sizes_of(network, len(x), None if x2 is None else len(x2))
        run = Run(network, found, [x] if x2 is None else [x, x2], progress)
        numels = {name: weight.numel() for name, weight in network.weights.items()}
        if sketch is not None:
            return run.sketched(make_sketch_plan(found, sizes, numels, sketch, memory_limit), sketch, seed)
        return run.exact(make_plan(found, sizes, numels, memory_limit))


@contextlib.contextmanager
def measuring(model: nn.Module, dtype: torch.dtype | None) -> Iterator[Network]:
    """Yield a model's network in eval mode, outside autocast and inference mode; the model comes back as it was."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with isolated(device_of(model)), untouched(model):
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it leaves out the layers inside an encoder
            yield Network(model, dtype)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def check_inputs(x: Tensor, x2: Tensor | None) -> None:
    """Refuse inputs that are not finite tensors (N, ...) of one shape."""
    for name, inputs in (("x", x), ("x2", x2)):
        if inputs is None and name == "x2":
            continue
        if not isinstance(inputs, Tensor):
            raise TypeError(f"{name} must be a tensor (N, ...), got {type(inputs).__name__}")
        if inputs.dtype in (torch.uint8, torch.bool) or inputs.is_complex():
            raise TypeError(f"{name} must be floating point, or token numbers, got {inputs.dtype}; "
                            f"images: {name}.float() / 255")  # fmt: skip
        if inputs.ndim < 2 or inputs.numel() == 0:
            raise ValueError(f"{name} must have shape (N, ...) and not be empty, got {tuple(inputs.shape)}")
        if inputs.is_floating_point() and not inputs.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if x2 is not None and (x.shape[1:] != x2.shape[1:] or x.is_floating_point() != x2.is_floating_point()):
        raise ValueError(f"x and x2 must hold inputs of one shape and kind, got {tuple(x.shape[1:])} of {x.dtype} and "
                         f"{tuple(x2.shape[1:])} of {x2.dtype}")  # fmt: skip


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return ``dtype`` if it is None or a floating-point type."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point type such as torch.float64, got {dtype!r}")
    return dtype


def choose_parameters(model: nn.Module, params: Predicate | Sequence[str] | None) -> list[str]:
    """Return the names of the chosen parameters, each parameter under its first name.

    Raises:
        TypeError: Neither names nor a predicate.
        ValueError: An unknown name, or no parameter.
    """
    known = dict(model.named_parameters())
    if params is None:
        chosen = [name for name, p in known.items() if p.requires_grad]
        if not chosen:
            raise ValueError("no parameter requires a gradient; choose some by params=")
    elif callable(params):
        chosen = [name for name, p in known.items() if params(name, p)]
    else:
        names = [params] if isinstance(params, str) else list(params)
        first = {id(p): name for name, p in known.items()}
        chosen = [name for asked in names for name in _named(model, asked, first)]
    chosen = [name for name in dict.fromkeys(chosen) if known[name].is_floating_point()]
    if not chosen:
        raise ValueError("params selects no parameter; names are " + ", ".join(list(known)[:8]) + ", ...")
    return chosen


def _named(model: nn.Module, asked: str, first: dict[int, str]) -> list[str]:
    """Return the first names of a parameter, or of all parameters of a module."""
    if not isinstance(asked, str):
        raise TypeError(f"params must be names or a predicate (name, parameter) -> bool, got {asked!r}")
    every = dict(model.named_parameters(remove_duplicate=False))
    if asked in every:
        return [first[id(every[asked])]]
    inside = [first[id(p)] for name, p in every.items() if name.startswith(f"{asked}.")]
    if not inside:
        modules = {name for name, module in model.named_modules() if name}
        raise unknown_name("parameter or module", asked, every.keys() | modules)
    return inside


def samples_of(x: Tensor, x2: Tensor | None) -> Tensor:
    """Return a few inputs, evenly spaced over both sides."""
    parts = [x] if x2 is None else [x, x2.to(x.device)]
    each = SAMPLES // len(parts)
    return torch.cat([part[torch.linspace(0, len(part) - 1, min(each, len(part))).long()] for part in parts])


def sizes_of(network: Network, n: int, m: int | None) -> Sizes:
    """Return the sizes that the plan depends on."""
    return Sizes(
        n=n,
        m=m,
        itemsize=network.dtype.itemsize,
        work_itemsize=work_dtype(network.dtype).itemsize,
        copied=network.copied,
        weights=max(weight.nbytes for weight in network.weights.values()),
    )
