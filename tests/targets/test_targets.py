"""Targets: the built-in ones, and mistakes in a user's own."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgeopt.accelerators import ACCELERATORS, load_accelerator
from edgeopt.device_profiles import load_device
from edgeopt.errors import ConfigError, UsageError
from edgeopt.exporter import EXPORTERS, load_exporter
from edgeopt.runtimes import RUNTIMES, load_runtime
from edgeopt.targets import list_targets, load_target
from edgeopt.targets.schema import Target
from edgeopt.types import Format, LayerRules, NpuKind, Scheme

PROMISED = [
    f"{platform}{runtime}-{precision}"
    for platform in ("android", "linux-arm64")
    for runtime in ("", "-onnx", "-executorch")
    for precision in ("fp32", "fp16", "int8", "int8-dynamic")
    if (runtime, precision) != ("-executorch", "fp16")
]
PROMISED += [
    f"{platform}-onnx-{precision}"
    for platform in ("android", "linux-arm64")
    for precision in ("w8", "w4", "8da4w", "w8a16")
]

OWN = """
summary = "mine"
platform = "android"
format = "litert"
runtimes = ["litert"]
device = "pixel-6"
[scheme]
precision = "w8a8"
activations = "static"
"""


def scheme_of(precision: str, activations: str, more: str = "") -> str:
    return OWN.replace('"w8a8"', f'"{precision}"').replace('"static"', f'"{activations}"') + more + "\n"


def test_every_promised_target_is_there_in_order() -> None:
    names = [target.name for target in list_targets()]
    assert names == sorted(names)
    assert set(PROMISED) <= set(names)


def test_platforms_have_the_same_targets() -> None:
    names = [target.name for target in list_targets()]
    android = [t.name.removeprefix("android") for t in list_targets() if t.platform == "android" and not t.accelerator]
    assert android == [name.removeprefix("linux-arm64") for name in names if name.startswith("linux-arm64")]


@pytest.mark.parametrize("target", list_targets(), ids=lambda target: target.name)
def test_builtin_targets_fit_the_rest(target: Target) -> None:
    assert target.format in EXPORTERS
    assert set(target.runtimes) <= set(RUNTIMES)
    assert target.format in load_device(target.device).formats
    assert target.gates.min_sqnr_db is not None
    known = {other.name for other in list_targets()}
    for text in target.advice.values():
        for word in re.findall(r"(?:android|linux-arm64|ethosu\d\d|edgetpu|qualcomm|ios|openvino)-[a-z0-9-]+", text):
            assert word in known
            assert word.startswith(target.platform) or target.accelerator is not None


@pytest.mark.parametrize("target", [t for t in list_targets() if t.accelerator is None], ids=lambda target: target.name)
def test_targets_for_cpus(target: Target) -> None:
    assert load_exporter(target.format).unsupported(target.scheme, LayerRules()) is None
    runtime = "" if target.format == "litert" else f"-{target.format}"
    assert target.name == f"{target.platform}{runtime}-{precision_name(target.scheme)}"
    # Integer arithmetic that is slower than float is not worth shipping; where only weights are small, bytes count.
    assert (target.gates.min_speedup == 1.0) == (target.scheme.activation_bits == 8)


@pytest.mark.parametrize("target", [t for t in list_targets() if t.accelerator], ids=lambda target: target.name)
def test_targets_for_accelerators(target: Target) -> None:
    kind = target.accelerator
    assert kind is not None
    npu = load_device(target.device).npu(kind)
    assert npu is not None, "the default device must have one"
    scheme = replace(target.scheme, npu=npu)
    assert load_exporter(target.format, kind).unsupported(scheme, LayerRules()) is None
    assert (target.format, kind) in ACCELERATORS
    emulated = [name for name in target.runtimes if load_runtime(name).emulates is not None]
    assert target.gates.min_speedup is None or not emulated, "an emulator is never timed"
    assert set(target.emulators) <= set(RUNTIMES)
    assert target.gates.min_accelerated == 0.5


@pytest.mark.parametrize("pair", ACCELERATORS, ids=lambda pair: "-".join(pair))
def test_every_accelerator_can_be_loaded(pair: tuple[Format, NpuKind]) -> None:
    load_exporter(*pair)
    reason = load_accelerator(*pair).unavailable()
    assert reason is None or "\n" not in reason


def precision_name(scheme: Scheme) -> str:
    """As in target names: the familiar "int8" for w8a8."""
    if scheme.precision != "w8a8":
        return scheme.precision
    return "int8" if scheme.needs_calibration else "int8-dynamic"


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean android-int8"):
        load_target("andriod-int8")
    with pytest.raises(UsageError, match="no such target file"):
        load_target("nowhere/mine.toml")


def write(tmp_path: Path, text: str, name: str = "mine.toml") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_own_file(tmp_path: Path) -> None:
    target = load_target(write(tmp_path, OWN + "[gates]\nmax-size-mb = 5\nmin-sqnr-db = 12\n"))
    assert target.name == "mine"
    assert target.gates.max_size_bytes == 5 << 20
    assert target.gates.min_sqnr_db == 12.0
    assert target.gates.min_speedup is None


def test_own_weights(tmp_path: Path) -> None:
    more = 'weight-granularity = "per-group"\ngroup-size = 64\nweight-symmetric = false\nweight-estimator = "hqq"'
    scheme = load_target(write(tmp_path, scheme_of("w4", "none", more))).scheme
    assert scheme == Scheme("w4", "none", "per-group", weight_symmetric=False, weight_estimator="hqq", group_size=64)
    coded = load_target(write(tmp_path, scheme_of("w8", "none", 'weight-values = "k-means"'))).scheme
    assert coded == Scheme("w8", "none", weight_values="k-means")
    shifts = load_target(write(tmp_path, OWN + 'scale = "power-of-two"')).scheme
    assert shifts == Scheme("w8a8", "static", scale="power-of-two")


def test_extends_merges_tables_and_can_drop_a_gate(tmp_path: Path) -> None:
    write(tmp_path, 'extends = "android-int8"\n[gates]\nmin-speedup = "off"\nmax-latency-ms = 8\n', "base.toml")
    target = load_target(write(tmp_path, 'extends = "base.toml"\nsummary = "stricter"\n[gates]\nmax-latency-ms = 4\n'))
    assert target.summary == "stricter"
    assert target.gates.min_speedup is None
    assert target.gates.max_latency_ms == 4
    assert target.gates.max_accuracy_drop == 0.01
    assert target.scheme == load_target("android-int8").scheme


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (OWN.replace("precision =", "precison ="), r"scheme.precison: unknown key; did you mean 'precision'"),
        (OWN + "[gates]\nmin_speedup = 1\n", r"gates.min_speedup: unknown key; did you mean 'min-speedup'"),
        (OWN + "[gates]\nmin-speedup = -1\n", r"gates.min-speedup: input should be greater than 0, got -1"),
        (OWN + "[gates]\nmin-speedup = '1'\n", r"gates.min-speedup: .*valid number, got '1'"),
        (OWN + "[gates]\nmin-sqnr-db = nan\n", r"gates.min-sqnr-db: .*finite"),
        (OWN + "[gates]\nmax-accuracy-drop = 1.5\n", r"gates.max-accuracy-drop: .*less than or equal to 1"),
        (OWN + "[extra]\n", r"extra: unknown key; known keys|extra: unknown key; did you mean"),
        (OWN.replace('platform = "android"', ""), r"platform: is missing"),
        (OWN.replace('"w8a8"', '"int8"'), r"scheme.precision: input should be 'fp32'.*got 'int8'"),
        (OWN.replace('"static"', '"none"'), r"'none' does not go with precision 'w8a8'; say \"static\""),
        (OWN.replace('"static"', '"dynamic"\nio = "int8"'), r"scheme.io"),
        (scheme_of("w8a16", "dynamic"), r"'dynamic' does not go with precision 'w8a16'; say \"static\""),
        (scheme_of("8da4w", "static"), r"'static' does not go with precision '8da4w'; say \"dynamic\""),
        (scheme_of("w4", "dynamic"), r"'dynamic' does not go with precision 'w4'; say \"none\""),
        (scheme_of("w8a16", "static", 'io = "int8"'), r"scheme.io: int8 inputs and outputs need 8-bit activations"),
        (scheme_of("w8", "none", "activation-symmetric = true"), r"scheme.activation-symmetric: w8 does not quantize"),
        (scheme_of("w8a8", "dynamic", 'scale = "power-of-two"'), r"scheme.scale: scales found at run time"),
        (
            scheme_of("fp16", "none", 'weight-estimator = "mse"'),
            r"scheme.weight-estimator: fp16 weights are not quantized",
        ),
        (scheme_of("fp32", "none", "weight-symmetric = false"), r"scheme.weight-symmetric: fp32 weights are not"),
        (
            scheme_of("fp16", "none", 'weight-values = "k-means"'),
            r"scheme.weight-values: fp16 weights are not",
        ),
        (scheme_of("fp16", "none", 'weight-granularity = "per-group"'), r"scheme.weight-granularity: fp16 weights"),
        (
            scheme_of("w8a8", "static", 'weight-values = "k-means"'),
            r"scheme.weight-values: kernels compute with linear",
        ),
        (
            scheme_of("w4", "none", 'weight-values = "k-means"\nweight-estimator = "hqq"'),
            r"weight-estimator: k-means weights have a table",
        ),
        (
            scheme_of("w4", "none", 'weight-values = "logarithmic"\nscale = "power-of-two"'),
            r"scheme.scale: logarithmic",
        ),
        (scheme_of("w4", "none", "group-size = 1"), r"scheme.group-size: input should be greater than or equal to 2"),
        (OWN.replace('["litert"]', "[]"), r"runtimes: "),
        ("scheme = 3", r"mine.toml: "),
        ("a = ", r"not valid TOML"),
        ("extends = 3", r"extends: must be"),
        ('extends = "mine.toml"', r"can't extend itself"),
        ('extends = "android-int9"', r"unknown target 'android-int9'"),
    ],
)
def test_mistakes_name_file_and_key(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        load_target(write(tmp_path, text))


def test_a_file_name_must_do_as_a_bundle_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a name"):
        load_target(write(tmp_path, OWN, "My Target.toml"))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_target(str(tmp_path / "mine.toml"))


def test_listing_needs_no_heavy_library() -> None:
    """`edgeopt targets` has 0.4 s for the whole process. A clock would measure the machine's other work, too."""
    heavy = "torch onnx onnxruntime litert_torch ai_edge_litert executorch transformers pandas scipy jinja2"
    script = (
        "import sys, edgeopt.targets, edgeopt.device_profiles\n"
        "edgeopt.targets.list_targets(), edgeopt.device_profiles.list_devices()\n"
        f"print(*[name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
