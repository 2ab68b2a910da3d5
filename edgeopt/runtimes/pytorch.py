"""The trained PyTorch module itself, as a session: the truth that exported float files are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.errors import DataError, UsageError
from edgeopt.runtimes.base import Session
from edgeopt.types import Array, Dim, Model, Signature, SignatureTensor, TensorSpec

if TYPE_CHECKING:
    import torch


class PyTorchSession(Session):
    """Runs `Model.module` eagerly on the CPU. Its native terms are the model's own: nothing is quantized or permuted.

    PyTorch has one thread count for the whole process; each run sets this session's own and restores the former.
    """

    def __init__(self, model: Model, threads: int = 1) -> None:
        """Raises UsageError when the model holds no torch module."""
        super().__init__(Signature(own_terms(model.inputs), own_terms(model.outputs)))
        if model.module is None:
            raise UsageError("holds no PyTorch module", where=f"model {model.name!r}", fix="run its native file")
        self._module: torch.nn.Module | None = model.module
        self._name = model.name
        self._threads = threads

    def run_native(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            DataError: when the module fails on these inputs.
            UsageError: when it returns something else than the tensors that the model says.
        """
        import torch

        if self._module is None:
            raise RuntimeError("the session is closed")
        former = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                # Copied: torch would share the caller's memory, and warns when that is read-only.
                result = self._module(*(torch.from_numpy(np.array(inputs[t.name])) for t in self.signature.inputs))
        # It is the user's code, so it may raise anything.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(f"the module fails on this input: {reason}", where=f"model {self._name!r}") from error
        finally:
            torch.set_num_threads(former)
        outputs = _flatten(result)
        names = [t.name for t in self.signature.outputs]
        if len(outputs) != len(names):
            raise UsageError(
                f"returns {len(outputs)} tensors, not {len(names)} ({', '.join(names)})", where=f"model {self._name!r}"
            )
        return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, outputs, strict=True)}

    def close(self) -> None:
        self._module = None


def open_source(model: Model, threads: int = 1) -> Session:
    """A session on the trained module itself. Raises UsageError when the model holds none (native graphs)."""
    return PyTorchSession(model, threads)


def own_terms(specs: tuple[TensorSpec, ...]) -> tuple[SignatureTensor, ...]:
    """Tensors of a graph that speaks the model's own terms: same names, types and layouts."""
    return tuple(
        SignatureTensor(
            name=spec.name,
            native_name=spec.name,
            shape=tuple(d.name if isinstance(d, Dim) else d for d in spec.shape),
            dtype=spec.dtype,
            model_dtype=spec.dtype,
        )
        for spec in specs
    )


def _flatten(result: object) -> list[torch.Tensor]:
    """The tensors of a (nested) list or tuple, in order."""
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [tensor for item in result for tensor in _flatten(item)]
    raise UsageError(f"returns a {type(result).__name__}, not tensors", where="module")
