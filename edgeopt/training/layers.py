"""Layer paths as users and exporters write them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from edgeopt.types import WRAPPED_ATTRIBUTE


def source_path(path: str) -> str:
    """A module's path in the user's own network, without a source adapter's prefix."""
    return path.removeprefix(f"{WRAPPED_ATTRIBUTE}.") if path != WRAPPED_ATTRIBUTE else ""


def layer_matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches the layer or a module that contains it, as `LayerRules` says."""
    parts = source_path(path).split(".")
    prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)
