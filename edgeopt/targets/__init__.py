"""What to build and how to judge it: one TOML file per target, or a file of the user's own."""

from __future__ import annotations

from edgeopt.targets.schema import Target


def load_target(name_or_path: str) -> Target:
    """A built-in target by name, or the user's by path (contains "/" or ends in .toml).

    Raises UsageError on an unknown name or absent file, ConfigError naming file and key on a mistake inside it.
    """
    from edgeopt.targets.loader import load  # here: pydantic would cost every command its import

    return load(name_or_path)


def list_targets() -> tuple[Target, ...]:
    """All built-in targets, by name."""
    from edgeopt.targets.loader import load, names

    return tuple(load(name) for name in names())
