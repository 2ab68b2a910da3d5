"""Recurrent layers unrolled: for sequences of one length, a GRU or LSTM is a chain of linear operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from edgeopt.compression.graph import arguments, is_node, name_of, shape_of
from edgeopt.compression.rewrites.base import ALL, EXACT_DB, Form
from edgeopt.types import NpuKind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

#: A step of a GRU is some fifteen operators.
MAX_STEPS = 128
_GATES = {"aten.gru.input": 3, "aten.lstm.input": 4}


@dataclass(frozen=True, slots=True)
class UnrollRecurrent:
    """GRU and LSTM layers of any depth, in one or both directions, step by step.

    Each gate's part of the input is computed for all steps at once, its bias included.
    """

    name: ClassVar[str] = "unroll-recurrent"
    summary: ClassVar[str] = "GRU and LSTM unrolled into linear operators, sigmoids and tanhs"
    helps: ClassVar[frozenset[NpuKind]] = ALL
    min_sqnr_db: ClassVar[float] = EXACT_DB

    def form(self, node: Node) -> Form | None:
        gates = _GATES.get(str(node.target))
        source = node.args[0] if gates else None
        shape = shape_of(source) if is_node(source) else None
        if gates is None or shape is None or len(shape) != 3:
            return None
        given = arguments(node)
        params, layers = given["params"], given["num_layers"]
        if not isinstance(params, list | tuple) or not isinstance(layers, int) or given["train"]:
            return None
        directions = 2 if given["bidirectional"] else 1
        steps = shape[1] if given["batch_first"] else shape[0]
        # An LSTM with projections has one more weight.
        if len(params) != layers * directions * (4 if given["has_biases"] else 2) or steps > MAX_STEPS:
            return None
        states = given["hx"] if isinstance(given["hx"], list | tuple) else [given["hx"]]
        return _unrolled(_gru if gates == 3 else _lstm, all(_is_zero(state) for state in states))


#: One direction of one layer: gates' shares of the input, recurrent weights and biases, state -> new state.
_Cell = Callable[[list["Tensor"], list["Tensor"], list["Tensor | None"], Sequence["Tensor"]], list["Tensor"]]


def _is_zero(state: object) -> bool:
    return is_node(state) and name_of(state) in ("aten.zeros", "aten.new_zeros", "aten.zeros_like")


def _unrolled(cell: _Cell, starts_at_zero: bool) -> Form:
    """Takes the arguments of aten.gru.input or aten.lstm.input, and returns what these do."""

    def run(
        x: Tensor,
        hx: Tensor | Sequence[Tensor],
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        import torch

        del dropout, train
        initial = list(hx) if isinstance(hx, list | tuple) else [hx]
        axis, width = (1 if batch_first else 0), (4 if has_biases else 2)
        last: list[list[Tensor]] = []
        for _ in range(num_layers):
            outputs = []
            for direction in range(2 if bidirectional else 1):
                number = len(last)
                own = params[number * width : (number + 1) * width]
                start = [] if starts_at_zero else [state[number] for state in initial]
                sequence, state = _direction(cell, x, axis, own, start, is_reversed=direction == 1)
                outputs.append(sequence)
                last.append(state)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        return x, *(torch.stack([state[k] for state in last]) for k in range(len(initial)))

    return run


def _direction(
    cell: _Cell,
    x: Tensor,
    axis: int,
    params: Sequence[Tensor],
    state: list[Tensor],
    *,
    is_reversed: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs of all steps, and the last state. An empty `state` is one of zeros."""
    import torch
    from torch.nn import functional

    w_input, w_state = params[0], params[1]
    gates = w_state.shape[0] // w_state.shape[1]
    b_input: list[Tensor | None] = [*params[2].chunk(gates)] if len(params) > 2 else [None] * gates
    b_state: list[Tensor | None] = [*params[3].chunk(gates)] if len(params) > 2 else [None] * gates
    for gate, (one, other) in enumerate(zip(b_input, b_state, strict=True)):
        # Both are added to the same sum, but for the gate of a GRU that resets what the state adds.
        if one is not None and other is not None and not (gates == 3 and gate == 2):
            b_input[gate], b_state[gate] = one + other, None
    recurrent = list(w_state.chunk(gates))
    shares = [functional.linear(x, weight, bias) for weight, bias in zip(w_input.chunk(gates), b_input, strict=True)]
    steps = range(x.shape[axis])
    outputs: list[Tensor] = []
    for step in reversed(steps) if is_reversed else steps:
        state = cell([share.select(axis, step) for share in shares], recurrent, b_state, state)
        outputs.append(state[0])
    if is_reversed:
        outputs.reverse()
    return torch.stack(outputs, axis), state


def _gru(
    shares: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], state: Sequence[Tensor]
) -> list[Tensor]:
    """r = s(W_r h + ...), z = s(W_z h + ...), n = tanh(x_n + r (W_n h + b_n)), h' = n + z (h - n)."""
    from torch.nn import functional

    if not state:
        reset, update = shares[0].sigmoid(), shares[1].sigmoid()
        new = (shares[2] if biases[2] is None else shares[2] + reset * biases[2]).tanh()
        return [new - update * new]
    (h,) = state
    reset = (shares[0] + functional.linear(h, weights[0])).sigmoid()
    update = (shares[1] + functional.linear(h, weights[1])).sigmoid()
    new = (shares[2] + reset * functional.linear(h, weights[2], biases[2])).tanh()
    return [new + update * (h - new)]


def _lstm(
    shares: list[Tensor], weights: list[Tensor], biases: list[Tensor | None], state: Sequence[Tensor]
) -> list[Tensor]:
    """i, f, o = s(W h + ...), g = tanh(W_g h + ...), c' = f c + i g, h' = o tanh(c')."""
    from torch.nn import functional

    del biases
    if state:
        h, c = state
        shares = [share + functional.linear(h, weight) for share, weight in zip(shares, weights, strict=True)]
    enter, forget, new, leave = shares[0].sigmoid(), shares[1].sigmoid(), shares[2].tanh(), shares[3].sigmoid()
    cell = forget * c + enter * new if state else enter * new
    return [leave * cell.tanh(), cell]
