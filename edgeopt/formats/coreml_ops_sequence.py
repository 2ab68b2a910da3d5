"""MIL operators with a state: recurrent layers, and the lists that loops write to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeopt.formats.coreml_values import Arguments, Operator, Results

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "tanh": torch.tanh,
}


def _lstm(a: Arguments) -> Results:
    """x (steps, batch, inputs); weights hold the input, forget, output and cell gates in that order."""
    x, h, c = a.tensor(), a.tensor("initial_h"), a.tensor("initial_c")
    direction = a.text("direction", "forward")
    if direction == "bidirectional":
        states = zip(h.chunk(2, -1), c.chunk(2, -1), ("", "_back"), (False, True), strict=True)
        runs = [_lstm_run(a, x, *state) for state in states]
    else:
        runs = [_lstm_run(a, x, h, c, "", direction != "forward")]
    outputs, hidden, cells = (torch.cat(parts, -1) for parts in zip(*runs, strict=True))
    return (outputs if a.flag("output_sequence", default=False) else hidden.unsqueeze(0)), hidden, cells


def _lstm_run(
    a: Arguments, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor, suffix: str, backward: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if f"peephole{suffix}" in a:
        raise ValueError("peephole weights")
    gate, cell, out = (
        _ACTIVATIONS[a.text(name, default)]
        for name, default in (("recurrent_activation", "sigmoid"), ("cell_activation", "tanh"), ("activation", "tanh"))
    )
    recurrent, bias = a.tensor(f"weight_hh{suffix}"), a.optional(f"bias{suffix}")
    projected = torch.nn.functional.linear(x, a.tensor(f"weight_ih{suffix}"), bias)
    steps = []
    for step in reversed(range(len(x))) if backward else range(len(x)):
        i, f, o, z = (projected[step] + h @ recurrent.T).chunk(4, -1)
        c = gate(f) * c + gate(i) * cell(z)
        if "clip" in a:
            c = c.clamp(-a.number("clip"), a.number("clip"))
        h = gate(o) * out(c)
        steps.append(h)
    return torch.stack(steps[::-1] if backward else steps), h, c


def _rnn(a: Arguments) -> Results:
    x, h = a.tensor(), a.tensor("initial_h")
    activation = _ACTIVATIONS[a.text("activation", "tanh")]
    recurrent = a.tensor("weight_hh")
    projected = torch.nn.functional.linear(x, a.tensor("weight_ih"), a.optional("bias"))
    backward = a.text("direction", "forward") != "forward"
    steps = []
    for step in reversed(range(len(x))) if backward else range(len(x)):
        h = activation(projected[step] + h @ recurrent.T)
        steps.append(h)
    outputs = torch.stack(steps[::-1] if backward else steps)
    return (outputs if a.flag("output_sequence", default=False) else h.unsqueeze(0)), h


def _make_list(a: Arguments) -> Results:
    zero = torch.zeros(a.ints("elem_shape"))
    return ([zero] * a.integer("init_length", 1),)


def _list_write(a: Arguments) -> Results:
    entries, index = list(a.entries("ls")), a.integer("index")
    value = a.tensor("value")
    entries.extend([torch.zeros_like(value)] * (index + 1 - len(entries)))
    entries[index] = value
    return (entries,)


def _list_scatter(a: Arguments) -> Results:
    entries, values = list(a.entries("ls")), a.tensor("value")
    for index, value in zip(a.ints("indices"), values, strict=True):
        entries.extend([torch.zeros_like(value)] * (index + 1 - len(entries)))
        entries[index] = value
    return (entries,)


SEQUENCE: dict[str, Operator] = {
    "list_gather": lambda a: torch.stack([a.entries("ls")[index] for index in a.ints("indices")]),
    "list_length": lambda a: torch.tensor(len(a.entries("ls")), dtype=torch.int32),
    "list_read": lambda a: a.entries("ls")[a.integer("index")],
    "list_scatter": _list_scatter,
    "list_write": _list_write,
    "lstm": _lstm,
    "make_list": _make_list,
    "rnn": _rnn,
}
