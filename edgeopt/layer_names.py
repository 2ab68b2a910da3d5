"""Layer paths as users write them, and the patterns that name them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from edgeopt.errors import UsageError
from edgeopt.types import WRAPPED_ATTRIBUTE


def strip_wrapper(layer: str) -> str:
    """A layer's path in the user's own module, without the source adapter's prefix."""
    return layer.removeprefix(f"{WRAPPED_ATTRIBUTE}.") if layer != WRAPPED_ATTRIBUTE else ""


def layer_is_exempt(layer: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern of `LayerRules` matches the layer's path or that of a module that contains it."""
    parts = strip_wrapper(layer).split(".")
    prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(prefix, pattern) for pattern in patterns for prefix in prefixes)


def check_patterns(layers: Collection[str], patterns: Iterable[str], flag: str) -> None:
    """Raise UsageError for a pattern that matches none of the layers, naming the flag that it came with."""
    for pattern in patterns:
        if any(layer_is_exempt(layer, (pattern,)) for layer in layers):
            continue
        near = get_close_matches(pattern, sorted({*layers} - {""}), n=3, cutoff=0.0)
        raise UsageError(
            "matches no layer",
            where=f"{flag} {pattern!r}",
            fix=f"did you mean {' or '.join(map(repr, near))}?" if near else "the model has no layers with names",
        )
