"""The forward pass of a network as a list of side-effect-free operations, for images of one shape."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, functionalize


class CannotRecordError(Exception):
    """The forward pass is not a fixed list of operations; the message gives the reason."""


class Slot(NamedTuple):
    """Placeholder for a value in the arguments of an operation."""

    number: int


class Operation(NamedTuple):
    """One step of the forward pass: ``values[slot] = target(*args, **kwargs)``."""

    slot: int
    target: Callable
    args: tuple
    kwargs: dict
    inputs: frozenset[int]

    def __call__(self, values: Mapping[int, Any], others: Mapping[int, Any], target: Callable | None = None) -> Any:
        """Run the operation, or an equivalent ``target``, on ``values``; missing slots are read from ``others``."""
        args = [_fill(arg, values, others) for arg in self.args]
        kwargs = {key: _fill(arg, values, others) for key, arg in self.kwargs.items()}
        return (target or self.target)(*args, **kwargs)


Pass = Sequence[tuple[Operation, Callable, tuple[int, ...]]]
"""Operations in order, each with the function to call and the slots that no later operation reads."""


class Recording:
    """The operations that turn images of one shape into logits.

    Args:
        model: A network in eval mode. It is run once; values that it stores during that run may be tracing proxies.
        state: Its parameters and buffers, each tensor under one name.
        images: Images (B, C, H, W) of the shape to record.

    Attributes:
        operations: The operations that the logits depend on, in order of execution.
        made: The slots that the operations fill.
        fixed: Slot to weight or constant: the values that exist before the first operation.
        image_slot: The slot of the images.

    Raises:
        CannotRecordError: The forward pass depends on tensor values, draws random numbers, or cannot be traced.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor], images: Tensor):
        before = _random_states(images.device)
        module = _trace(model, state, images)
        if not all(map(torch.equal, before, _random_states(images.device))):
            raise CannotRecordError("it draws random numbers")
        nodes = list(module.graph.nodes)
        slots = {node: number for number, node in enumerate(nodes)}
        inputs = [slots[node] for node in nodes if node.op == "placeholder"]
        self._weight_slots = dict(zip(state, inputs))
        self.image_slot = inputs[-1]
        self._output = slots[_output(nodes[-1])]
        self.operations = _operations(nodes, slots, self._output)
        self.made = frozenset(op.slot for op in self.operations)
        self.fixed = {slots[n]: operator.attrgetter(n.target)(module) for n in nodes if n.op == "get_attr"}
        self.fixed |= {slot: state[name] for name, slot in self._weight_slots.items()}
        self._owners = _owners(nodes, slots)
        self._bytes = {slots[node]: _bytes(node) for node in nodes}
        self._overwriting = _overwriting(nodes, slots, self._owners)
        self.whole = self.compile(self.operations)

    def touched_by(self, names: Sequence[str]) -> list[Operation]:
        """Return the operations whose results depend on the weights ``names``."""
        dirty = {self._weight_slots[name] for name in names}
        touched = []
        for op in self.operations:
            if not dirty.isdisjoint(op.inputs):
                dirty.add(op.slot)
                touched.append(op)
        return touched

    def bytes_of(self, slots: set[int]) -> int:
        """Return the bytes held by the values of ``slots``; views count once per tensor, those of weights never."""
        return sum(self._bytes[owner] for owner in {self._owners[slot] for slot in slots} if owner in self.made)

    def compile(self, operations: Sequence[Operation]) -> Pass:
        """Return a pass that frees each value after its last use and runs in place on its own values that are dead."""
        made = {op.slot for op in operations}
        last_reader = {slot: op.slot for op in operations for slot in op.inputs if slot in made}
        last_reader.pop(self._output, None)
        frees: dict[int, list[int]] = {}
        for slot, reader in last_reader.items():
            frees.setdefault(reader, []).append(slot)
        steps = []
        for op in operations:
            overwritten, target = self._overwriting.get(op.slot, (None, op.target))
            steps.append((op, target if overwritten in made else op.target, tuple(frees.get(op.slot, ()))))
        return steps

    def run(self, part: Pass, known: Mapping[int, Any], weights: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (B, K) of ``part``, run on the ``known`` values with ``weights`` as replacements."""
        values: dict[int, Any] = {self._weight_slots[name]: weight for name, weight in weights.items()}
        for op, target, frees in part:
            values[op.slot] = op(values, known, target)
            for slot in frees:
                del values[slot]
        return values[self._output]


def _fill(arg: Any, values: Mapping[int, Any], others: Mapping[int, Any]) -> Any:
    kind = type(arg)
    if kind is Slot:
        number = arg.number
        return values[number] if number in values else others[number]
    if kind is list:
        return [_fill(a, values, others) for a in arg]
    return arg


def _random_states(device: torch.device) -> list[Tensor]:
    on_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *on_device]


def _trace(model: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    def forward(weights: list[Tensor], x: Tensor) -> Tensor:
        return functional_call(model, dict(zip(state, weights)), (x,))

    inputs = (list(state.values()), images)
    try:
        module = make_fx(forward)(*inputs)
        if any(_mutates(node) for node in module.graph.nodes):
            # a second trace, since functionalize takes no custom autograd.Function, which the first one dissolves
            module = make_fx(functionalize(module, remove="mutations"))(*inputs)
        return module
    except Exception as error:  # torch raises many kinds where control flow depends on data or an operator is foreign
        raise CannotRecordError(f"its forward pass cannot be traced: {error}") from error


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _output(node: fx.Node) -> fx.Node:
    (result,) = node.args
    if isinstance(result, (list, tuple)) and len(result) == 1:
        (result,) = result
    if not isinstance(result, fx.Node):
        raise CannotRecordError("its output is not one tensor that depends on the images")
    return result


def _operations(nodes: list[fx.Node], slots: dict[fx.Node, int], output: int) -> list[Operation]:
    """Return the operations that the output depends on, in order of execution."""
    wanted, operations = {output}, []
    for node in reversed(nodes):
        if node.op != "call_function" or slots[node] not in wanted:
            continue
        args = tuple(_template(arg, slots) for arg in node.args)
        kwargs = {key: _template(arg, slots) for key, arg in node.kwargs.items()}
        inputs = frozenset(slots[n] for n in node.all_input_nodes)
        operations.append(Operation(slots[node], node.target, args, kwargs, inputs))
        wanted |= inputs
    return operations[::-1]


def _template(arg: Any, slots: dict[fx.Node, int]) -> Any:
    """Return an argument with a slot for each node; sequences that hold slots become lists, all others tuples."""
    if isinstance(arg, fx.Node):
        return Slot(slots[arg])
    if isinstance(arg, (list, tuple)):
        parts = [_template(a, slots) for a in arg]
        return parts if any(type(part) in (Slot, list) for part in parts) else tuple(parts)
    return arg


def _makes_views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _owners(nodes: list[fx.Node], slots: dict[fx.Node, int]) -> dict[int, int]:
    """Map each slot to the owner of its memory: itself, or the slot of the tensor that it is a view of."""
    owners: dict[int, int] = {}
    for node in nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        picks_view = node.target is operator.getitem and _makes_views(source)
        is_view = node.op == "call_function" and source is not None and (picks_view or _makes_views(node))
        owners[slots[node]] = owners[slots[source]] if is_view else slots[node]
    return owners


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")  # several values have their memory counted where each is picked out
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _overwriting(nodes: list[fx.Node], slots: dict[fx.Node, int], owners: dict[int, int]) -> dict[int, tuple]:
    """Map a slot to an input that it may overwrite and the in-place operator for it, such as ``relu_``."""
    overwriting = {}
    for node in nodes:
        source = node.args[0] if node.op == "call_function" and node.args else None
        target = _in_place(node.target)
        if target is None or not isinstance(source, fx.Node) or _makes_views(node):
            continue
        if len(source.users) != 1 or [*node.args, *node.kwargs.values()].count(source) != 1:
            continue
        before, after = source.meta.get("val"), node.meta.get("val")
        alike = (
            isinstance(before, Tensor)
            and isinstance(after, Tensor)
            and (before.shape, before.dtype, before.stride()) == (after.shape, after.dtype, after.stride())
        )
        if alike and owners[slots[source]] == slots[source]:
            overwriting[slots[node]] = (slots[source], target)
    return overwriting


def _in_place(target: Any) -> Callable | None:
    """Return the in-place variant of an ATen operator, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    packet = getattr(torch.ops.aten, target._schema.name.split("::")[1] + "_", None)
    return None if packet is None else getattr(packet, target._overloadname, None)
