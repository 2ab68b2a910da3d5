import gc
import time

import numpy as np
import pytest

from edgeopt.errors import ConversionError, MissingError, UsageError
from edgeopt.runtimes import RUNTIMES
from edgeopt.types import Artifact, Signature, SignatureTensor
from edgeopt.validation import worker
from edgeopt.validation.benchmark import TimedFile, benchmark, benchmark_pair, run_worker
from edgeopt.validation.worker import Request

#: A runtime whose "files" are lines of what to do, so that no vendor's library is needed.
FAKE = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from edgeopt.errors import MissingError
from edgeopt.runtimes.base import Session

LIBRARY = np.ones(40_000_000 // 8)  # what importing a runtime costs

class FakeSession(Session):
    def __init__(self, signature, words, threads):
        super().__init__(signature)
        self.words, self.runs = words, 0
        self.weights = np.ones(int(words.get("mb", 0)) * 2**20 // 8)
        assert os.environ["OMP_NUM_THREADS"] == str(threads)

    def run_native(self, inputs):
        self.runs += 1
        assert inputs["x"].dtype == np.float32 and inputs["x"].flags.c_contiguous
        print("vendor noise on stdout")
        if self.words.get("die") and self.runs == 3:
            os.kill(os.getpid(), getattr(signal, self.words["die"]))
        if "raise" in self.words:
            raise ValueError(self.words["raise"])
        end = time.perf_counter() + float(self.words.get("ms", 1)) / 1e3
        while time.perf_counter() < end:
            pass
        return {"y": inputs["x"]}

    def close(self):
        if "crash-on-close" in self.words:
            os.abort()

class FakeRuntime:
    name = "fake"
    def unavailable(self):
        return None
    def open(self, path, signature, threads=1):
        words = dict(line.split("=") for line in Path(path).read_text().split())
        if "missing" in words:
            raise MissingError("fake is not installed", fix="pip install fake")
        return FakeSession(signature, words, threads)
"""

X = SignatureTensor("x", "x", (1, 2), "float32", "float32")
SIGNATURE = Signature((X,), (SignatureTensor("y", "y", (1, 2), "float32", "float32"),))
INPUTS = {"x": np.ones((1, 2))}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "fake_runtime.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(RUNTIMES, "fake", "fake_runtime:FakeRuntime")

    def make(subject, words):
        path = tmp_path / f"{subject}.fake"
        path.write_text(words)
        return TimedFile(subject, path, SIGNATURE, "fake", INPUTS)

    return make


def by_name(measurements):
    return {(m.name, m.subject): m for m in measurements}


def test_a_pair_is_timed_and_weighed(fake):
    # Memory in the program that asks must not count, nor what the runtime's libraries take.
    ballast = np.ones(200_000_000 // 8)
    found = by_name(benchmark_pair(fake("quantized", "ms=1 mb=8"), fake("float", "ms=2 mb=32"), 1, 0.5))
    assert ballast.size
    assert list(found) == [
        ("latency_ms", "quantized"),
        ("latency_ms", "float"),
        ("speedup", "quantized"),
        ("peak_memory_bytes", "quantized"),
        ("peak_memory_bytes", "float"),
        ("size_bytes", "quantized"),
        ("size_bytes", "float"),
    ]
    # Other work on the machine can only make it slower.
    assert found["latency_ms", "quantized"].value >= 1
    assert found["speedup", "quantized"].value > 1
    for name in ("latency_ms", "speedup"):
        low, high = found[name, "quantized"].spread
        assert low <= found[name, "quantized"].value <= high
    assert found["peak_memory_bytes", "quantized"].value == pytest.approx(8 * 2**20, rel=0.3)
    assert found["peak_memory_bytes", "float"].value == pytest.approx(32 * 2**20, rel=0.1)
    assert found["size_bytes", "quantized"].value == len("ms=1 mb=8")
    assert {m.provenance for m in found.values()} == {"measured-host"}
    assert found["latency_ms", "float"].threads == 1


def artifact(file, precision):
    return Artifact(file.path, "litert", precision, SIGNATURE, 1, "0" * 64, (), {}, ())


def test_a_file_alone(fake):
    file = fake("model", "ms=1")
    for precision, subject in (("fp32", "float"), ("w8a8", "quantized")):
        found = by_name(benchmark(artifact(file, precision), None, "fake", INPUTS, 1, budget_s=0.2))
        assert list(found) == [("latency_ms", subject), ("peak_memory_bytes", subject), ("size_bytes", subject)]


def test_a_slow_model_still_gets_three_rounds(fake):
    found = by_name(benchmark_pair(fake("model", "ms=150"), None, 1, budget_s=0.1))
    assert found["latency_ms", "model"].repetitions == worker.MIN_ROUNDS


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_runtime_that_dies_is_one_line_with_the_signal(fake, name):
    with pytest.raises(
        ConversionError, match=rf"good\.fake, bad\.fake: measuring it failed: its runtime died of {name}"
    ):
        benchmark_pair(fake("good", "ms=1"), fake("bad", f"die={name}"), 1, 0.2)


def test_a_crash_while_closing_does_not_lose_the_figures(fake):
    assert benchmark_pair(fake("model", "crash-on-close=1"), None, 1, 0.2)


def test_an_exception_of_the_runtime_is_one_line(fake):
    with pytest.raises(ConversionError, match=r"model\.fake: measuring it failed: ValueError: no-kernel"):
        benchmark_pair(fake("model", "raise=no-kernel"), None, 1, 0.2)


def test_our_own_errors_come_through(fake):
    with pytest.raises(MissingError, match="fake is not installed; pip install fake") as caught:
        benchmark_pair(fake("model", "missing=1"), None, 1, 0.2)
    assert caught.value.exit_code == 3


def test_a_worker_that_does_not_end(fake, tmp_path):
    file = fake("model", "ms=60000")
    np.savez(tmp_path / "x.npz", INPUTS["x"])
    request = worker.FileRequest(str(file.path), SIGNATURE, "fake_runtime:FakeRuntime", str(tmp_path / "x.npz"), ("x",))
    start = time.monotonic()
    with pytest.raises(ConversionError, match="did not end within 2 s"):
        run_worker(Request("latency", (request,), 1, 0.1), timeout_s=2)
    assert time.monotonic() - start < 10


def test_a_missing_input_is_named(fake):
    file = fake("model", "ms=1")
    with pytest.raises(UsageError, match="lacks the input 'x'"):
        benchmark_pair(TimedFile("a", file.path, SIGNATURE, "fake", {"z": np.ones(1)}), None, 1)


def test_a_numpy_py_in_the_working_directory_stays_out(fake, tmp_path, monkeypatch):
    trap = tmp_path / "cwd"
    trap.mkdir()
    (trap / "numpy.py").write_text("raise SystemExit('ran a file of the working directory')")
    monkeypatch.chdir(trap)
    assert benchmark_pair(fake("model", "ms=1"), None, 1, 0.1)


class Clock:
    """Time that passes only when a session runs."""

    now = 0.0


class Recorded:
    """Runs for so many milliseconds each time, the last of them for ever after."""

    def __init__(self, clock, log, name, *ms):
        self.clock, self.log, self.name, self.ms = clock, log, name, list(ms)

    def run_native(self, inputs):
        del inputs
        self.clock.now += (self.ms.pop(0) if len(self.ms) > 1 else self.ms[0]) / 1e3
        self.log.append(self.name)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(worker, "perf_counter", lambda: clock.now)
    return clock


def test_rounds_alternate_and_end_with_the_budget(clock):
    log = []
    sessions = [Recorded(clock, log, "a", 50, 10), Recorded(clock, log, "b", 25)]
    rounds, invocations = worker.time_rounds(sessions, [{}, {}], budget_s=0.5)
    assert rounds[0] == pytest.approx([10.0] * 10)
    assert rounds[1] == pytest.approx([25.0] * 10)
    assert invocations == [30, 10]
    assert log[-40:] == ["a", "a", "a", "b"] * 10


def test_rounds_stop_early_once_the_median_is_known(clock):
    sessions = [Recorded(clock, [], "a", 30)]
    rounds, _ = worker.time_rounds(sessions, [{}], budget_s=100)
    assert len(rounds[0]) == worker.SETTLED_ROUNDS
    uneven = [Recorded(clock, [], "a", *[30, 60] * 10_000)]
    rounds, _ = worker.time_rounds(uneven, [{}], budget_s=8)
    assert len(rounds[0]) > 100


def test_garbage_collection_is_back_on_after_a_failure(clock):
    class Failing(Recorded):
        def run_native(self, inputs):
            super().run_native(inputs)
            if clock.now > 0.3:
                raise ValueError

    with pytest.raises(ValueError):
        worker.time_rounds([Failing(clock, [], "a", 30)], [{}], budget_s=100)
    assert gc.isenabled()


def test_peak_memory_follows_what_is_in_use():
    before = worker.reset_peak()
    block = np.ones(64 * 2**20 // 8)
    assert worker.peak() - before == pytest.approx(block.nbytes, rel=0.1)
