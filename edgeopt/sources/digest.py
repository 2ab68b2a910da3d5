"""SHA-256 of what a model was loaded from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20


def sha256_of(files: Iterable[Path], module: torch.nn.Module | None = None) -> str:
    """Over the files' bytes in the given order (no names), then the module's state dict in name order."""
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(CHUNK):
                content.update(block)
        digest.update(content.digest())
    if module is not None:
        _add_state(digest, module)
    return digest.hexdigest()


def _add_state(digest: hashlib._Hash, module: torch.nn.Module) -> None:
    import torch

    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            # A module's own extra state may be anything; only what it computes with counts.
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
