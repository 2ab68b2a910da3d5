"""device_report.json: documented in docs/device-check.md of edgeopt."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import conditions, figures
from .errors import FAILED, MISSING, USAGE, CheckError

if TYPE_CHECKING:
    from .check import Result

NAME = "device_report.json"
SCHEMA_VERSION = 1
_UNMEASURED = "could not be measured on this device"


def document(result: Result) -> dict[str, object]:
    """The report as plain values, with its verdict: passed, failed, or incomplete."""
    contents, settings, facts = result.contents, result.settings, result.facts
    latency = _latency(result)
    checks = _checks(result, latency)
    complete = result.differences is not None
    passed = all(check["passed"] for check in checks)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "edgeopt-device-report",
        "provenance": "measured-device",
        "status": "failed" if not passed else "passed" if complete else "incomplete",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(result.seconds, 1),
        "manifest_sha256": contents.manifest_sha256,
        "model": {
            "name": contents.name,
            "target": contents.target,
            "profile": contents.profile,
            "file": contents.model.name,
            "sha256": contents.model_sha256,
            "size_bytes": contents.model.stat().st_size,
            "format": contents.format,
            "precision": contents.precision,
        },
        "device": {
            "name": facts.name,
            "manufacturer": facts.manufacturer or None,
            "model": facts.model or None,
            "soc": facts.soc or None,
            "os": facts.os,
            "os_version": facts.os_version or None,
            "kernel": facts.kernel or None,
            "abi": facts.abi,
            "memory_bytes": facts.memory_kb * 1024 if facts.memory_kb is not None else None,
            "transport": result.transport,
        },
        "runtime": {"format": contents.format, "program": result.program, "version": result.version},
        "settings": {
            "threads": settings.threads,
            "cpus": list(result.cpus) or None,
            "affinity": conditions.mask(result.cpus) or None,
            "warmup": result.warmup,
            "runs": latency["runs"],
        },
        "load_ms": result.timing.load_ms,
        "first_ms": result.timing.first_ms,
        "latency_ms": latency,
        "latencies_ms": list(result.timing.latencies_ms),
        "peak_memory_bytes": result.timing.peak_bytes,
        "golden": _golden(result),
        "checks": checks,
        "before": conditions.as_json(result.before),
        "after": conditions.as_json(result.after),
        "throttled": bool(result.throttling),
        "throttling": list(result.throttling),
        "not_checked": [{"what": what, "why": why} for what, why in result.not_checked],
    }


def exit_code(report: dict[str, object]) -> int:
    """0 passed, 1 failed, 3 where something needed to check the outputs is missing."""
    return {"passed": 0, "failed": FAILED}.get(str(report["status"]), MISSING)


def check_place(path: Path) -> None:
    """Raise CheckError, before the long work, where the report could not be written."""
    if not os.access(path.parent, os.W_OK | os.X_OK) or path.is_dir():
        raise CheckError(f"{path} can't be written; name another place with --output", USAGE)


def write(report: dict[str, object], path: Path) -> None:
    """Put it in place at once: a reader finds the old report or the whole new one."""
    text = json.dumps(report, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink()
            raise
    except OSError as error:
        raise CheckError(
            f"{path} can't be written: {error.strerror}; name another place with --output", USAGE
        ) from error


def lines(report: dict[str, object], result: Result) -> list[str]:
    """For a person."""
    latency, settings = _latency(result), result.settings
    where = f"CPU {','.join(map(str, result.cpus))}" if result.cpus else "any CPU"
    shown = {key: f"{value:.4g}" for key, value in latency.items() if key != "runs" and value is not None}
    found = [f"outputs: not checked, {why}" for what, why in result.not_checked if what == "golden"]
    if result.differences is not None:
        worst = max((difference.value for difference in result.differences), default=0.0)
        found = [f"outputs: at most {worst:.2%} of the range off, {result.contents.tolerance:.2%} allowed"]
    found.append(
        f"latency: {shown.get('p50', shown.get('mean', '?'))} ms median, {shown.get('p90', '?')} p90, "
        f"{shown.get('min', '?')} to {shown.get('max', '?')}, {latency['runs']} runs, "
        f"{settings.threads} {'thread' if settings.threads == 1 else 'threads'} on {where}"
    )
    if result.timing.load_ms is not None and result.timing.first_ms is not None:
        found.append(f"loading: {result.timing.load_ms:.4g} ms, first inference {result.timing.first_ms:.4g} ms")
    if result.timing.peak_bytes is not None:
        found.append(f"peak memory: {result.timing.peak_bytes / (1 << 20):.1f} MiB, by {result.program}")
    found += [f"throttled: {reason}" for reason in result.throttling]
    found += [f"not checked: {what}: {why}" for what, why in result.not_checked if what != "golden"]
    found += [_verdict(check) for check in _checks(result, latency) if not check["passed"]]
    return [*found, str(report["status"])]


def _latency(result: Result) -> dict[str, float | int | None]:
    times = result.timing.latencies_ms
    if times:
        return {
            "runs": len(times),
            "mean": math.fsum(times) / len(times),
            "min": min(times),
            "p25": figures.quantile(times, 0.25),
            "p50": figures.quantile(times, 0.5),
            "p75": figures.quantile(times, 0.75),
            "p90": figures.quantile(times, 0.9),
            "max": max(times),
        }
    summary = result.timing.summary_ms
    told = {key: summary.get(key) for key in ("mean", "min", "p25", "p50", "p75", "p90", "max")}
    return {"runs": result.settings.runs, **told}


def _golden(result: Result) -> dict[str, object]:
    tolerance = result.contents.tolerance
    differences = result.differences
    worst = max((difference.value for difference in differences), default=0.0) if differences is not None else None
    return {
        "vectors": len(result.contents.vectors),
        "tolerance": tolerance,
        "worst": _finite(worst),
        "passed": None if worst is None else worst <= tolerance,
        "outputs": [
            {
                "vector": difference.vector,
                "output": difference.output,
                "difference": _finite(difference.value),
                "passed": difference.value <= tolerance,
            }
            for difference in differences or ()
        ],
    }


def _checks(result: Result, latency: dict[str, float | int | None]) -> list[dict[str, object]]:
    """The outputs and the gates of the bundle that a device can decide."""
    contents = result.contents
    checks = []
    if result.differences is not None:
        worst = max((difference.value for difference in result.differences), default=0.0)
        checks.append(_check("golden", worst, contents.tolerance, "fraction of range"))
    if contents.max_latency_ms is not None:
        measured = latency["p50"] if latency["p50"] is not None else latency["mean"]
        checks.append(_check("latency_ms", measured, contents.max_latency_ms, "ms"))
    if contents.max_peak_memory_bytes is not None:
        checks.append(_check("peak_memory_bytes", result.timing.peak_bytes, contents.max_peak_memory_bytes, "bytes"))
    return checks


def _check(name: str, measured: float | None, limit: float, unit: str) -> dict[str, object]:
    return {
        "name": name,
        "measured": _finite(measured),
        "limit": limit,
        "op": "<=",
        "unit": unit,
        "passed": measured is not None and measured <= limit,
    }


def _verdict(check: dict[str, object]) -> str:
    measured = check["measured"]
    if check["name"] == "golden":
        return "FAILED: the outputs are not those of the golden vectors"
    if measured is None:
        return f"FAILED: {check['name']} {_UNMEASURED}, the limit is {check['limit']} {check['unit']}"
    return f"FAILED: {check['name']} is {measured:.4g} {check['unit']}, the limit is {check['limit']}"


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: null, and `passed` false, says that the outputs can't be compared."""
    return value if value is not None and math.isfinite(value) else None
