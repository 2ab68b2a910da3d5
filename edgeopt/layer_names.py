"""Layer paths as users write them, and the patterns that name them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from edgeopt.types import WRAPPED_ATTRIBUTE


def strip_wrapper(layer: str) -> str:
    """A layer's path in the user's own module, without the source adapter's prefix."""
    return layer.removeprefix(f"{WRAPPED_ATTRIBUTE}.") if layer != WRAPPED_ATTRIBUTE else ""


def layer_is_exempt(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern of `LayerRules` matches the layer's path or that of a module that contains it."""
    parts = strip_wrapper(layer).split(".")
    prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)
