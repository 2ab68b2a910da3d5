"""Under which conditions was it measured? Clocks, temperatures and the battery, and the cores that it ran on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import figures
from .errors import USAGE, CheckError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .device import Device

#: Android's PowerManager.THERMAL_STATUS_*: from 2, "moderate", on it throttles.
_THROTTLING_STATUS = 2
#: A device measures this hot, in degrees Celsius, or not at all: some zones give sentinels.
_HOTTEST, _COLDEST = 150.0, -40.0
#: Coolers that slow a processor down, as the kernel calls them.
_CPU_COOLER = re.compile(r"cpufreq|cpu-|thermal-cpu|Processor", re.IGNORECASE)


@dataclass(frozen=True)
class Policy:
    """CPUs that share a clock. Frequencies in kHz; `cap` is the highest allowed now, `most` what the hardware can."""

    cpus: tuple[int, ...]
    governor: str
    current_khz: int | None
    cap_khz: int | None
    most_khz: int | None


@dataclass(frozen=True)
class Battery:
    level_percent: int | None
    temperature_c: float | None
    charging: bool | None


@dataclass(frozen=True)
class State:
    """One look at the device. `temperatures_c` is by thermal zone; `coolers` how far each CPU cooler is turned up."""

    policies: tuple[Policy, ...]
    capacities: tuple[tuple[int, int | None], ...]
    temperatures_c: tuple[tuple[str, float], ...]
    coolers: tuple[tuple[str, int], ...]
    thermal_status: int | None
    battery: Battery | None

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(cpu for cpu, _ in self.capacities)


def look(device: Device) -> State:
    return parse(device.call("state").text)


def parse(text: str) -> State:
    """The lines that on_device.sh prints; what a device leaves empty is None."""
    rows = [line.split("|") for line in text.splitlines() if "|" in line]
    policies = tuple(
        Policy(tuple(map(int, re.findall(r"\d+", row[1]))), row[2], _int(row[3]), _int(row[4]), _int(row[5]))
        for row in rows
        if row[0] == "policy" and len(row) == 6
    )
    online = [row for row in rows if row[0] == "cpu" and len(row) == 4 and row[2] != "0"]
    zones = [(row[1], _int(row[2])) for row in rows if row[0] == "zone" and len(row) == 3]
    coolers = [(row[1], _int(row[2])) for row in rows if row[0] == "cooler" and len(row) == 3]
    statuses = [_int(row[1]) for row in rows if row[0] == "thermal_status"]
    return State(
        policies=policies,
        capacities=tuple(sorted((int(row[1]), _int(row[3])) for row in online)),
        temperatures_c=tuple((zone, raw / 1000) for zone, raw in zones if raw is not None and _plausible(raw)),
        coolers=tuple((kind, level) for kind, level in coolers if level is not None and _CPU_COOLER.search(kind)),
        thermal_status=statuses[0] if statuses else None,
        battery=_battery(rows),
    )


def choose_cpus(wanted: str, state: State, threads: int) -> tuple[int, ...]:
    """Which CPUs to run on: "big", "little", "all" or a list like "4-7" or "0,2".

    The big ones are those with the highest clock or capacity, joined by the next ones until every thread has its own.
    Empty where the device does not tell its CPUs apart; raises CheckError on CPUs that it does not have.
    """
    if wanted == "all" or not state.cpus:
        return ()
    if wanted in ("big", "little"):
        speeds = _speeds(state)
        ordered = sorted(set(speeds.values()), reverse=wanted == "big")
        chosen: list[int] = []
        for speed in ordered:
            chosen += [cpu for cpu in state.cpus if speeds[cpu] == speed]
            if len(chosen) >= threads:
                break
        return tuple(sorted(chosen)) if len(ordered) > 1 else ()
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", wanted):
        raise CheckError(f"--cpus {wanted!r} is none of big, little, all, or a list such as 4-7", USAGE)
    listed: list[int] = []
    for part in wanted.split(","):
        first, _, last = part.partition("-")
        listed += range(int(first), int(last or first) + 1)
    for cpu in listed:
        if cpu not in state.cpus:
            raise CheckError(f"--cpus {wanted}: the device has no CPU {cpu} online", USAGE)
    return tuple(sorted(set(listed)))


def mask(cpus: Sequence[int]) -> str:
    """For `taskset`: hexadecimal, one bit per CPU; "" for no restriction."""
    return f"{sum(1 << cpu for cpu in cpus):x}" if cpus else ""


def throttling(before: State, after: State, times: Sequence[float]) -> tuple[str, ...]:
    """What says that the device slowed down while it was measured."""
    reasons = []
    for old in before.policies:
        new = next((policy for policy in after.policies if policy.cpus == old.cpus), None)
        if new and new.cap_khz and old.cap_khz and new.cap_khz < old.cap_khz:
            reasons.append(f"the clock of CPU {_listed(old.cpus)} was capped from {old.cap_khz} to {new.cap_khz} kHz")
    if after.thermal_status is not None and after.thermal_status >= _THROTTLING_STATUS:
        reasons.append(f"Android's thermal status is {after.thermal_status}")
    levels = dict(before.coolers)
    reasons += [f"the cooler {kind} went up to {level}" for kind, level in after.coolers if level > levels.get(kind, 0)]
    if figures.slowed_down(times):
        first, last = (figures.quantile(part, 0.5) for part in (times[: len(times) // 4], times[-(len(times) // 4) :]))
        reasons.append(f"runs became slower, from {first:.3g} to {last:.3g} ms")
    return tuple(reasons)


def capped(state: State) -> tuple[str, ...]:
    """CPUs whose clock is held below what the hardware can, before anything ran: by heat, or to save power."""
    return tuple(
        f"the clock of CPU {_listed(policy.cpus)} was capped at {policy.cap_khz} of {policy.most_khz} kHz before"
        for policy in state.policies
        if policy.cap_khz and policy.most_khz and policy.cap_khz < policy.most_khz
    )


def as_json(state: State) -> dict[str, object]:
    battery = state.battery
    return {
        "clocks": [
            {
                "cpus": list(policy.cpus),
                "governor": policy.governor or None,
                "current_khz": policy.current_khz,
                "cap_khz": policy.cap_khz,
                "most_khz": policy.most_khz,
            }
            for policy in state.policies
        ],
        "temperatures_c": [{"zone": zone, "value": value} for zone, value in state.temperatures_c],
        "coolers": [{"type": kind, "level": level} for kind, level in state.coolers],
        "thermal_status": state.thermal_status,
        "battery": None
        if battery is None
        else {
            "level_percent": battery.level_percent,
            "temperature_c": battery.temperature_c,
            "charging": battery.charging,
        },
    }


def _speeds(state: State) -> dict[int, tuple[int, int]]:
    clocks = {cpu: policy.most_khz or 0 for policy in state.policies for cpu in policy.cpus}
    return {cpu: (capacity or 0, clocks.get(cpu, 0)) for cpu, capacity in state.capacities}


def _battery(rows: list[list[str]]) -> Battery | None:
    told = {row[1]: row[2] for row in rows if row[0] == "dumpsys_battery" and len(row) == 3}
    if told:
        tenths = _int(told.get("temperature", ""))
        status = told.get("status")  # BatteryManager: 2 is charging, 5 full
        return Battery(
            _int(told.get("level", "")),
            tenths / 10 if tenths is not None else None,
            status in ("2", "5") if status else None,
        )
    for row in rows:
        if row[0] == "battery" and len(row) == 4:
            tenths = _int(row[3])
            charging = row[2] in ("Charging", "Full", "Not charging") if row[2] else None
            return Battery(_int(row[1]), tenths / 10 if tenths is not None else None, charging)
    return None


def _plausible(millidegrees: int) -> bool:
    return _COLDEST < millidegrees / 1000 < _HOTTEST and millidegrees != 0


def _listed(cpus: Sequence[int]) -> str:
    return ",".join(map(str, cpus))


def _int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text.strip()) else None
