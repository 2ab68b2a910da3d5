"""OpenVINO without its telemetry: importing this module imports OpenVINO.

`import openvino` reports itself to a web analytics service unless the user has opted out in a file in the home
directory. It does without where the package openvino-telemetry is absent, which is what it is made to see here. That is
an effect of importing on purpose: the process in which memory is measured loads the modules that the one before it had
loaded, in their order, so this one must do its work before `openvino` is imported there.
"""

from __future__ import annotations

import sys
from types import ModuleType

_TELEMETRY = "openvino_telemetry"


def _import_silently() -> None:
    hide = "openvino" not in sys.modules and _TELEMETRY not in sys.modules
    if hide:
        # It has no submodules, so what OpenVINO wants of it can't be imported.
        sys.modules[_TELEMETRY] = ModuleType(_TELEMETRY)
    try:
        import openvino  # noqa: F401 - for its effect
    finally:
        if hide:
            del sys.modules[_TELEMETRY]


_import_silently()
