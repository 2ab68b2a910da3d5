"""edgeopt as a process of its own: exit codes, pipes, signals, and how long it takes to start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

#: Wall seconds; the aim is 0.4 on a machine that has nothing else to do (docs/cli.md), CI machines have.
START_LIMIT = 1.5

EDGEOPT = (sys.executable, "-m", "edgeopt")


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EDGEOPT, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("export", "--help"), ("targets",), ("devices",)])
def test_it_starts_fast(arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = run(*arguments, folder=tmp_path)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n  edgeopt {' '.join(arguments)}: {min(times):.2f} s")
    assert min(times) < START_LIMIT


@pytest.mark.parametrize("arguments", [("--help",), ("export", "--help"), ("targets",)])
def test_light_commands_import_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    script = f"""
import sys
from edgeopt.cli import main
main({arguments!r})
heavy = {{"torch", "onnx", "onnxruntime", "litert_torch", "executorch", "transformers", "PIL", "scipy", "jax"}}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.stderr == "[]\n"


def test_a_usage_error_is_exit_code_2_and_one_line(tmp_path: Path) -> None:
    done = run("export", "--config", "absent.toml", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.toml: no such file; 'edgeopt init' writes one\n"


def test_a_failing_command_prints_its_error_last_when_both_streams_are_one() -> None:
    fake = "import sys; from edgeopt.cli import main, failures; print('report'); "
    script = fake + "sys.exit(failures.report_failure(failures.UsageError('is wrong'), False))"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "report\nerror: is wrong\n")


@pytest.mark.parametrize("arguments", ["targets --json", "--help", "devices"])
def test_a_closed_pipe_is_quiet(arguments: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m edgeopt {arguments} | (exec 0<&-; sleep 1); echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def test_ctrl_c_is_one_line_and_130(tmp_path: Path) -> None:
    script = """
import signal, sys
from types import ModuleType
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell starts with it ignored
pipeline = ModuleType("edgeopt.pipeline")
def export(config, progress):
    import os
    os.write(2, b"noise")
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(60)
pipeline.export = export
sys.modules["edgeopt.pipeline"] = pipeline
from edgeopt.cli import main
sys.exit(main(["export", "x.onnx"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "error: interrupted\n")
    assert list(tmp_path.glob("edgeopt-*.log")) == []


def test_no_colour_unless_on_a_terminal(tmp_path: Path) -> None:
    assert "\x1b" not in run("targets", "android-int8", folder=tmp_path).stdout
    assert "\x1b" not in run("targets", "android-int8", folder=tmp_path, NO_COLOR="1", FORCE_COLOR="").stdout
