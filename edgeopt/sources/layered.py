"""An exported graph that keeps its source layers, wherever it is traced again. Imports torch: import it late."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule, Interpreter, traceback

if TYPE_CHECKING:
    from torch.fx.graph import PythonCode


class LayeredGraph(GraphModule):
    """When torch.export meets a graph module inside another module, it runs its generated code, which knows nothing of
    the layers that the operators came from. This one then runs operator by operator, and hands each one's layer on."""

    def recompile(self) -> PythonCode:
        code: PythonCode = super().recompile()
        own = type(self)  # GraphModule gives each instance a class of its own
        own.forward = _traceable(own.forward)
        return code


def _traceable(compiled: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(compiled)
    def forward(self: GraphModule, *inputs: torch.Tensor) -> object:
        if not torch.compiler.is_exporting():
            return compiled(self, *inputs)
        with traceback.preserve_node_meta():
            return Interpreter(self).run(*inputs)

    return forward
