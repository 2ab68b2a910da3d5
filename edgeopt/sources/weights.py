"""State dict files into a module, without ever executing what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError

if TYPE_CHECKING:
    import torch

    from edgeopt.sources.structure import Structure

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

#: Where training scripts commonly put the state dict within a checkpoint.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")

#: What DataParallel and torch.compile put before every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

#: How many keys a message names.
NAMED_KEYS = 3


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Fill the module from a file; where `save_model` wrote that, the module takes the shape of the saved one first.

    Raises UsageError, with the module as it was, when the file is absent, corrupt, or doesn't fit.
    """
    if not path.is_file():
        raise UsageError("no such weights file", where=str(path))
    if path.suffix not in SUFFIXES:
        raise UsageError("is not a weights file", where=str(path), fix=f"give one of {', '.join(SUFFIXES)}")
    if path.suffix != ".safetensors":
        _load(module, _without_prefix(_read_checkpoint(path), module), path)
        return
    state, structure = _read_safetensors(path)
    if structure is None:
        _load(module, _without_prefix(state, module), path)
    else:
        _load_restructured(module, state, structure, path)


def _load(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    _fit(module, state, path)
    module.load_state_dict(state)


def _load_restructured(module: torch.nn.Module, state: dict[str, torch.Tensor], text: str, path: Path) -> None:
    from edgeopt.sources.structure import parse, restructured
    from edgeopt.sources.structure_values import user_module

    structure = parse(text, str(path))
    try:
        # Nothing is allocated before every shape is known to be that of a tensor in the file.
        with restructured(module, structure):
            _check_sizes(structure, state)
            _fit(user_module(module), state, path)
    except UsageError as error:
        if error.where == str(path):
            raise
        raise UsageError(
            f"was made from another network than {type(user_module(module)).__name__} ({error.line()})",
            where=str(path),
            fix="give the factory of the network that it was made from",
        ) from error
    user_module(module).load_state_dict(state)


def _check_sizes(structure: Structure, state: Mapping[str, torch.Tensor]) -> None:
    for edit in structure.tensors:
        if edit.shape is not None and not any(name in state and state[name].shape == edit.shape for name in edit.names):
            raise UsageError("has another shape than the file's tensor of that name", where=f"tensor {edit.names[0]!r}")


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors, and the structure's JSON where there is one."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    from edgeopt.sources.structure_file import METADATA_KEY

    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        return dict(load_file(path)), metadata.get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"is corrupt ({error})", where=str(path), fix="write or download it again") from error


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        content: object = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UsageError(
            "is corrupt or holds more than tensors, and edgeopt runs no code from weights files",
            where=str(path),
            fix="save the state dict alone: torch.save(model.state_dict(), FILE) or safetensors",
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UsageError(
            f"is corrupt ({type(error).__name__}: {str(error).partition(chr(10))[0]})",
            where=str(path),
            fix="write or download it again",
        ) from error
    for candidate in (content, *_nested(content)):
        if isinstance(candidate, Mapping) and candidate and _are_tensors(candidate):
            return {str(key): value for key, value in candidate.items()}
    raise UsageError("holds no state dict", where=str(path), fix="save it with torch.save(model.state_dict(), FILE)")


def _nested(content: object) -> list[object]:
    return [content[key] for key in CHECKPOINT_KEYS if key in content] if isinstance(content, Mapping) else []


def _are_tensors(candidate: Mapping[object, object]) -> bool:
    import torch

    return all(isinstance(value, torch.Tensor) for value in candidate.values())


def _without_prefix(state: dict[str, torch.Tensor], module: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = module.state_dict()
    for prefix in WRAPPER_PREFIXES:
        is_own = all(key.startswith(prefix) for key in own)
        if state and not is_own and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fit(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """Complete the state, and check that it is the module's."""
    own = {key: value for key, value in module.state_dict(keep_vars=True).items() if hasattr(value, "shape")}
    # Files that hold shared tensors once leave all names but one out.
    given = {id(value): state[key] for key, value in own.items() if key in state}
    for key, value in own.items():
        if id(value) in given:
            state.setdefault(key, given[id(value)])
        # Batch norm's counter, which checkpoints before torch 0.4.1 lack, matters to training only.
        elif key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "other shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    texts = [f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys]
    if texts:
        raise UsageError(
            f"does not fit {type(module).__name__} ({'; '.join(texts)})",
            where=str(path),
            fix="give the weights of this very architecture",
        )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else ""
    return ", ".join(keys[:NAMED_KEYS]) + more
