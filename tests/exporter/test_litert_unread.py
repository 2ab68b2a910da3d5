"""A part of a larger network is converted without the weights of the other parts."""

from __future__ import annotations

import torch

from edgeopt.exporter.litert_graph import drop_unread_weights


class _Part(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.tied = torch.nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("unread", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.tied(self.first(x))
        return y


def test_unread_weights_are_forgotten_and_tied_ones_kept() -> None:
    part, x = _Part().eval(), torch.ones(1, 4)
    program = torch.export.export(part, (x,)).module(check_guards=False)
    assert isinstance(program, torch.fx.GraphModule)
    drop_unread_weights(program)
    names = {name for name, _ in program.named_parameters(remove_duplicate=False)}
    assert "first.bias" in names
    assert not any(name.startswith("other") for name in names)
    assert "unread" not in dict(program.named_buffers())
    torch.testing.assert_close(program(x), part(x), rtol=0, atol=0)
    assert part.other.weight.shape == (4, 4)  # the network itself keeps what it has
