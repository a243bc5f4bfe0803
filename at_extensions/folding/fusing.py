"""A convolution that waits for the sum and the ReLU that follow it, to be computed with them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from at_extensions.folding.layers import EvalNorm, FoldedNorm, does_nothing
from at_extensions.folding.tracing import Trace, is_hooked, module_of

_ADD = (operator.add, operator.iadd, torch.add)  # as a trace has them
_ADD_TENSORS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)  # as a call has them; none writes into a tensor
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)

_CALM = (nn.Conv2d, EvalNorm, nn.AvgPool2d, nn.MaxPool2d)  # these very types write into nothing of what they read


def fusable(network: nn.Module, trace: Trace, convolutions: type) -> dict[nn.Module, bool]:
    """Find the convolutions after which nothing but a sum, a ReLU, or both can come.

    Nothing else may run in between that could write into what the convolution reads.

    Args:
        network: A twin's network, its layers those of a twin.
        trace: Its trace.
        convolutions: The type of its convolutions that can wait.

    Returns:
        Whether a ReLU comes last, for each such convolution.
    """
    found: dict[nn.Module, bool] = {}
    summed: set[fx.Node] = set()  # sums one of whose terms waits already
    for node in trace.graph.nodes:
        conv = module_of(network, node)
        if type(conv) is convolutions and not is_hooked(conv) and trace.calls[conv] == 1:
            chain = _chain(network, node)
            sums = set(filter(_is_sum, chain))
            calm = _is_calm(network, chain, (*_CALM, convolutions))
            if (sums or _is_relu(network, chain[-1])) and not sums & summed and calm:
                found[conv] = _is_relu(network, chain[-1])
                summed |= sums
    return found


def _chain(network: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return a convolution and the nodes after it that can be computed with it."""
    chain = [node]
    while len(node.users) == 1:
        node = next(iter(node.users))
        is_last = _is_relu(network, node)
        if not (is_last or does_nothing(module_of(network, node)) or (_is_sum(node) and not any(map(_is_sum, chain)))):
            break
        if not node.meta["records"]:  # an autograd.Function takes what waits for no tensor
            break
        chain.append(node)
        if is_last:
            break
    return chain


def _is_calm(network: nn.Module, chain: list[fx.Node], calm: tuple[type, ...]) -> bool:
    """Whether nothing that runs between a chain's ends can write into what the first one reads."""
    node = chain[0]
    while node is not chain[-1]:
        module = module_of(network, node)
        is_calm = type(module) in calm and not is_hooked(module) and "forward" not in vars(module)
        if not (is_calm or does_nothing(module) or node in chain or node.op in ("placeholder", "get_attr")):
            return False
        node = node.next
    return True


def _is_sum(node: fx.Node) -> bool:
    known = node.target in _ADD if node.op == "call_function" else node.target in ("add", "add_")
    terms = [term for term in node.args if isinstance(term, fx.Node)]
    return node.op in ("call_function", "call_method") and known and len(set(terms)) == 2 and not node.kwargs


def _is_relu(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = module_of(network, node)
        if type(module) is FoldedNorm and not is_hooked(module) and "act" in module._modules:
            return type(module.drop) is nn.Identity and _is_plain_relu(module.act)
        return _is_plain_relu(module)
    return node.target in _RELU if node.op == "call_function" else node.target in ("relu", "relu_")


def _is_plain_relu(module: nn.Module) -> bool:
    return type(module) is nn.ReLU and not is_hooked(module) and "forward" not in vars(module)


class Pending:
    """What a convolution will return: a tensor to whoever asks for it, computed when somebody does.

    A sum and a ReLU are taken along where gradients are recorded, or not, as they were for the convolution; whatever
    else is done to it is done to the computed tensor. oneDNN's ReLU, if it is taken along, turns NaN into 0.

    Args:
        compute: Maps what is to be added (or None), and whether a ReLU comes last, to the result.
        fits: Whether a tensor can be added in ``compute``.
        waits_for_relu: Whether a sum is not yet the end.
    """

    def __init__(
        self,
        compute: Callable[[Tensor | None, bool], Tensor],
        fits: Callable[[object], bool],
        *,
        waits_for_relu: bool,
        other: Tensor | None = None,
    ):
        self._compute, self._fits, self._waits_for_relu, self._other = compute, fits, waits_for_relu, other
        self._grad_mode = torch.is_grad_enabled()
        self._tensor: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        """Take a sum or a ReLU along; compute the tensor for anything else."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if function in _RELU and isinstance(first, Pending):
            return first._ended(relu=True)
        if function in _ADD_TENSORS and len(args) == 2 and not kwargs:
            here, other = args if isinstance(first, Pending) else reversed(args)
            if here._takes(other):
                return here._plus(other)
        return function(*_computed(args), **_computed(kwargs))

    def __getattr__(self, name: str) -> object:
        return getattr(self._ended(), name)

    def __add__(self, other: object) -> object:
        return self._plus(other) if self._takes(other) else self._ended() + _computed(other)

    __radd__ = __add__

    def __iadd__(self, other: object) -> object:
        if self._takes(other):
            return self._plus(other)
        tensor = self._ended()
        tensor += _computed(other)
        return tensor

    def add_(self, other: object, **kwargs) -> object:
        """Add in place, as nobody else has seen the tensor."""
        return self.__iadd__(other) if not kwargs else self._ended().add_(_computed(other), **kwargs)

    def add(self, other: object, **kwargs) -> object:
        """Add."""
        return self + other if not kwargs else self._ended().add(_computed(other), **kwargs)

    def relu(self) -> Tensor:
        """Compute it all."""
        return self._ended(relu=True)

    relu_ = relu

    def _takes(self, other: object) -> bool:
        is_alone = self._tensor is None and self._other is None
        return is_alone and self._is_in_mode() and isinstance(other, Tensor) and self._fits(other)

    def _is_in_mode(self) -> bool:
        return torch.is_grad_enabled() == self._grad_mode

    def _plus(self, other: Tensor) -> Tensor | Pending:
        if not self._waits_for_relu:
            return self._run(other, False)
        return Pending(self._compute, self._fits, waits_for_relu=True, other=other)

    def _ended(self, relu: bool = False) -> Tensor:
        if self._tensor is None:
            if relu and self._is_in_mode():
                return self._run(self._other, True)
            self._tensor = self._run(self._other, False)
        return F.relu(self._tensor) if relu else self._tensor

    def _run(self, other: Tensor | None, relu: bool) -> Tensor:
        with torch.set_grad_enabled(self._grad_mode):
            return self._compute(other, relu)


def _computed(value: object) -> object:
    """Replace what is pending by its tensor."""
    if isinstance(value, Pending):
        return value._ended()
    if isinstance(value, (tuple, list)):
        return type(value)(map(_computed, value))
    return {key: _computed(v) for key, v in value.items()} if isinstance(value, dict) else value


def _on_tensor(name: str) -> Callable:
    def method(self: Pending, *args) -> object:
        return getattr(self._ended(), name)(*_computed(args))

    return method


for _name in (
    *("sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv", "pow", "matmul", "rmatmul"),
    *("neg", "abs", "lt", "le", "gt", "ge", "getitem", "setitem", "len", "iter"),
):
    setattr(Pending, f"__{_name}__", _on_tensor(f"__{_name}__"))
