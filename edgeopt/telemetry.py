"""Nothing that edgeopt runs reports to anyone."""

from __future__ import annotations

import os


def opt_out() -> None:
    """Keep ONNX Runtime from collecting usage data; to be called before it is imported.

    Its wheels for Linux write a database below ~/.cache/Microsoft and send it, from threads that also cost time where
    we measure. Its own `disable_telemetry_events` comes too late: that database is begun by the import. A user who
    has set the variable decides for himself.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
