"""State dict files into a module, without ever executing what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import UsageError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

#: Where training scripts commonly put the state dict within a checkpoint.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")

#: What DataParallel and torch.compile put before every key.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")

#: How many keys a message names.
NAMED_KEYS = 3


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Fill the module from a file. Raises UsageError when it is absent, corrupt, or doesn't fit."""
    if not path.is_file():
        raise UsageError("no such weights file", where=str(path))
    if path.suffix not in SUFFIXES:
        raise UsageError("is not a weights file", where=str(path), fix=f"give one of {', '.join(SUFFIXES)}")
    state = _without_prefix(_read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path))
    _fit(module, state, path)
    module.load_state_dict(state)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
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


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in WRAPPER_PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fit(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    own = {key: value for key, value in module.state_dict().items() if hasattr(value, "shape")}
    for key, value in own.items():
        # Batch norm's counter, which checkpoints before torch 0.4.1 lack, matters to training only.
        if key.endswith("num_batches_tracked"):
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
