"""Runs many samples through a module side by side: all of them stop at each layer before any goes on.

A layer can so be changed with what every sample brings to it in view, and its successors then see the change, in one
run of the network. Samples keep runs of their own, whatever their shapes are, so a module with a fixed batch size of 1
is as good as any. Each runs on a copy of the module that shares its weights: modules may keep activations on `self`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from edgeopt.compression.layers import Call, Layer, by_identity, intercept
from edgeopt.errors import ConversionError

if TYPE_CHECKING:
    import torch


def run_in_lockstep(
    module: torch.nn.Module,
    layers: Iterable[Layer],
    runs: Sequence[tuple[torch.Tensor, ...]],
    handle: Callable[[Sequence[Call]], Sequence[torch.Tensor]],
) -> None:
    """Call the module once per tuple of arguments; `handle` answers each layer's calls of all runs, in their order.

    Memory holds what every run keeps alive between two layers. Raises ConversionError when the runs don't call the
    same layers in the same order.
    """
    _Lockstep(module, layers, runs, handle).run()


class _Lockstep:
    """A thread per run, of which one computes at a time; the others wait for their turn or at the barrier."""

    def __init__(
        self,
        module: torch.nn.Module,
        layers: Iterable[Layer],
        runs: Sequence[tuple[torch.Tensor, ...]],
        handle: Callable[[Sequence[Call]], Sequence[torch.Tensor]],
    ) -> None:
        self._modules = _copies(module, runs)
        self._layers = by_identity(module, layers)
        self._runs = runs
        self._handle = handle
        self._turn = threading.Lock()
        self._barrier = threading.Barrier(len(runs), action=self._answer)
        self._calls: list[Call | None] = [None] * len(runs)
        self._answers: list[torch.Tensor | None] = [None] * len(runs)
        self._error: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self._run_one, args=(i,), daemon=True) for i in range(len(self._runs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _run_one(self, index: int) -> None:
        import torch

        def wait_for_all(call: Call) -> torch.Tensor:
            self._calls[index] = call
            self._turn.release()
            try:
                self._barrier.wait()
            finally:
                self._turn.acquire()
            self._calls[index] = None
            answer, self._answers[index] = self._answers[index], None
            assert answer is not None
            return answer

        try:
            with self._turn, torch.no_grad(), intercept(self._layers, wait_for_all):
                self._modules[index](*self._runs[index])
            self._barrier.wait()
        except threading.BrokenBarrierError:
            return
        except BaseException as error:
            self._error = self._error or error
            self._barrier.abort()

    def _answer(self) -> None:
        """Runs in one thread while all others wait, with every run at a layer, or at its end."""
        import torch

        calls = [call for call in self._calls if call is not None]
        if not calls:
            return
        try:
            if len(calls) < len(self._runs) or len({call.layer.weight for call in calls}) > 1:
                raise ConversionError(
                    "is not reached by all samples alike",
                    where=f"layer {calls[0].layer.path!r}",
                    fix="leave this pass out for a network whose path depends on its input",
                )
            with torch.no_grad():
                self._answers[:] = self._handle(calls)
        except BaseException as error:
            self._error = error
            raise


def _copies(module: torch.nn.Module, runs: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.nn.Module]:
    """A copy per run. They share parameters, and what no run writes to: buffers and exported graphs."""
    import torch

    parameters = {id(parameter): parameter for parameter in module.parameters()}
    trial = copy.deepcopy(module, dict(parameters))
    buffers = dict(trial.named_buffers(remove_duplicate=False))
    versions = {name: buffer._version for name, buffer in buffers.items()}
    with torch.no_grad():
        trial(*runs[0])
    written = {name for name, buffer in buffers.items() if buffer._version != versions[name]}
    shared: dict[int, object] = dict(parameters)
    shared |= {id(b): b for name, b in module.named_buffers(remove_duplicate=False) if name not in written}
    for path, part in module.named_modules():
        # Copying one compiles it anew, and there is nothing that it could keep on `self`.
        if isinstance(part, torch.fx.GraphModule) and not any(name.startswith(path) for name in written):
            shared[id(part)] = part
    return [copy.deepcopy(module, dict(shared)) for _ in runs]
