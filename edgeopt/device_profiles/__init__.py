"""Where the model will run: one TOML file per device, or a file of the user's own."""

from __future__ import annotations

from edgeopt.device_profiles.schema import DeviceProfile


def load_device(name_or_path: str) -> DeviceProfile:
    """A built-in device by name, or the user's by path (contains "/" or ends in .toml).

    Raises UsageError on an unknown name or absent file, ConfigError naming file and key on a mistake inside it.
    """
    from edgeopt.device_profiles.loader import load  # here: pydantic would cost every command its import

    return load(name_or_path)


def list_devices() -> tuple[DeviceProfile, ...]:
    """All built-in devices, by name."""
    from edgeopt.device_profiles.loader import load, names

    return tuple(load(name) for name in names())
