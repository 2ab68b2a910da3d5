"""What must hold of the latency model whatever its parameters are fitted to."""

from __future__ import annotations

import pytest

from edgeopt.device_profiles import list_devices, load_device
from edgeopt.device_profiles.schema import CoreCluster, DeviceProfile, Feature
from edgeopt.errors import UsageError
from edgeopt.prediction.machine import machine
from edgeopt.prediction.model import EFFICIENCIES, LIMITS, demand, milliseconds, parts
from edgeopt.prediction.parameters import load
from edgeopt.prediction.work import Arithmetic, Kind, OpWork


def op(
    kind: Kind = "conv", arithmetic: Arithmetic = "fp32", macs: int = 10**7, moved: int = 10**5, channels: int = 64
) -> OpWork:
    return OpWork("op", kind, kind, arithmetic, macs, channels, 10**4, 10**4, moved)


def device(features: tuple[Feature, ...], *clusters: tuple[str, int, int]) -> DeviceProfile:
    found = tuple(CoreCluster(core, number, mhz, features) for core, number, mhz in clusters)
    return DeviceProfile("mine", "Mine", "board", "soc", 2024, 1024, found, (), ("litert",), (), ("https://x.org",))


def ms(on: DeviceProfile, threads: int, *works: OpWork) -> float:
    return float(milliseconds(demand(works, machine(on, threads)), load().parameters).sum())


@pytest.mark.parametrize("name", ["pixel-4", "galaxy-s24", "raspberry-pi-4", "moto-e20", "iphone-15"])
@pytest.mark.parametrize("work", [op(), op("depthwise", "int8"), op("elementwise", macs=0), op(moved=10**8)])
def test_more_threads_are_never_slower(name: str, work: OpWork) -> None:
    times = [ms(load_device(name), threads, work) for threads in range(1, 10)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[1]


def test_int8_gains_by_instruction_set() -> None:
    core = ("cortex-a76", 4, 2000)
    plain, dot, matrix = (("neon",), ("neon", "dotprod"), ("neon", "dotprod", "i8mm"))
    times = [ms(device(features, core), 1, op(arithmetic="int8")) for features in (plain, dot, matrix)]
    assert ms(device(plain, core), 1, op()) > times[0] > times[1] > times[2]


def test_dot_products_do_nothing_for_depthwise_layers() -> None:
    core = ("cortex-a76", 4, 2000)
    work = op("depthwise", "int8")
    assert ms(device(("neon",), core), 1, work) == ms(device(("neon", "dotprod"), core), 1, work)


def test_fp16_needs_its_instructions() -> None:
    core = ("cortex-a76", 4, 2000)
    without, having = device(("neon",), core), device(("neon", "fp16"), core)
    assert ms(without, 1, op(arithmetic="fp16")) == ms(without, 1, op())
    assert ms(having, 1, op(arithmetic="fp16")) < ms(having, 1, op())


def test_a_faster_clock_and_a_tile_that_is_full() -> None:
    slow, fast = (device(("neon",), ("cortex-a53", 4, mhz)) for mhz in (1000, 2000))
    assert ms(fast, 1, op()) == pytest.approx(ms(slow, 1, op()) / 2)
    assert ms(slow, 1, op(channels=33)) > ms(slow, 1, op(channels=40))


def test_what_limits_an_operator() -> None:
    on = machine(device(("neon",), ("cortex-a53", 4, 1400)), 1)
    works = [op(), op(macs=10, moved=10**8), op(macs=10, moved=10, channels=8)]
    terms = parts(demand(works, on), load().parameters)
    assert [LIMITS[max(range(3), key=lambda term: terms[term][i])] for i in range(3)] == list(LIMITS)


def test_renaming_memory_is_free_and_an_empty_file_takes_no_time() -> None:
    assert ms(load_device("pixel-4"), 1, op("free", macs=0)) == 0
    assert ms(load_device("pixel-4"), 1) == 0


def test_threads_go_to_the_fastest_cores_first() -> None:
    on = machine(load_device("pixel-4"), 5)
    assert [core.name for core in on.cores] == ["cortex-a76"] * 4 + ["cortex-a55"]
    assert on.fastest.ghz == 2.84
    assert machine(load_device("pixel-4"), 99).threads == 8
    assert machine(load_device("raspberry-pi-4"), 1, max_mhz=1500).fastest.ghz == 1.5


def test_devices_are_known_or_refused_by_name() -> None:
    for profile in list_devices():
        if any(cluster.core.startswith(("cortex-m", "lion", "gracemont")) for cluster in profile.clusters):
            with pytest.raises(UsageError, match=f"device '{profile.name}': .* knows nothing about the core"):
                machine(profile, 1)
        else:
            assert machine(profile, 4).threads >= 1
    with pytest.raises(UsageError, match="--threads: must be 1 or more"):
        machine(load_device("pixel-4"), 0)


def test_the_fitted_parameters_are_whole() -> None:
    model = load()
    assert set(model.parameters.efficiency) == set(EFFICIENCIES)
    assert set(model.widths) == {"published", "unseen", "calibrated-1", "calibrated-3"}
    assert 0 < model.widths["calibrated-3"] <= model.widths["calibrated-1"] < model.widths["unseen"] < 1
    assert sum(model.published.values()) == model.figures
    assert 0 < model.parameters.serial < 1
    assert 0 < model.parameters.sharing <= 1
