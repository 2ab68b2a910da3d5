"""Weights files of networks whose shape is not the one that their factory builds.

Imports torch only when it is used; `edgeopt.sources.structure` holds the rest.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError, UsageError
from edgeopt.json_data import dumps
from edgeopt.sources.weights import load_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgeopt.types import Model

METADATA_KEY = "edgeopt.structure"


def save_weights(model: Model, original: Model, path: Path) -> None:
    """Write what steps made of a model; see `save_model`. Raises ConversionError where either has no torch module."""
    if model.module is None or original.module is None:
        raise ConversionError("has no torch module to save", where=model.name)
    save_model(model.module, original.module, path)


def save_model(module: nn.Module, original: nn.Module, path: Path) -> None:
    """Write a changed network's state and structure as .safetensors, beside and then renamed; shared tensors once.

    Args:
        module: what to write, in the source's adapter or not.
        original: as the user's factory builds it, with any weights.

    Raises:
        ConversionError: the change can't be described.
        UsageError: the file can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from edgeopt.sources.structure_diff import describe
    from edgeopt.sources.structure_values import user_module

    structure = describe(original, module)
    # One key alone: with more, their order in the file is not defined.
    metadata = {"format": "pt"} if structure.is_empty else {METADATA_KEY: dumps(structure)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
            partial = Path(scratch) / "weights.safetensors"
            save_file(_state(user_module(module)), partial, metadata)
            partial.replace(path)
    except OSError as error:
        raise UsageError(f"can't be written: {error.strerror}", where=str(path)) from error
    except SafetensorError as error:  # a full disk, say
        raise UsageError(f"can't be written: {error}", where=str(path)) from error


def load_model(module: nn.Module, path: Path | str) -> nn.Module:
    """Load what `save_model` wrote into a network fresh from its factory, in place, and return it.

    ::

        from edgeopt.sources.structure import load_model

        net = load_model(MyNet(), "pruned.safetensors").eval()

    Args:
        module: in the source's adapter or not.

    Raises UsageError, with the module as it was, when the file is absent, corrupt, or of another architecture.
    """
    from edgeopt.sources.structure_values import user_module

    load_weights(user_module(module), Path(path))
    return module


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor under its first name, none sharing memory with another."""
    from torch import Tensor

    found: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    storages: set[int] = set()
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                "holds extra state that is no tensor, which can't be written", where=f"layer {name!r}"
            )
        view = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if view in seen and value.numel():
            continue
        storage = value.untyped_storage().data_ptr()
        tensor = value.cpu().contiguous()
        found[name] = tensor.clone() if storage in storages else tensor
        seen.add(view)
        storages.add(storage)
    return found
