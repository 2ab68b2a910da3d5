"""What the Core ML runtimes say before they run anything; running is tested in tests/e2e/test_coreml.py."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from edgeopt.errors import ConversionError, MissingError
from edgeopt.runtimes.coreml import CoreMLRuntime
from edgeopt.runtimes.coreml_reference import CoreMLReference
from edgeopt.types import Signature


@pytest.mark.skipif(platform.system() == "Darwin", reason="Core ML runs here")
def test_core_ml_is_apples() -> None:
    assert CoreMLRuntime().unavailable() == "Core ML runs on macOS and iOS only"
    with pytest.raises(MissingError, match="macOS and iOS only"):
        CoreMLRuntime().open(Path("model.mlpackage"), Signature((), ()))


def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.formats.coreml_program.find_spec", lambda _: None)
    assert "pip install 'edgeopt[apple]'" in (CoreMLReference().unavailable() or "")
    with pytest.raises(MissingError, match=r"edgeopt\[apple\]"):
        CoreMLReference().open(Path("model.mlpackage"), Signature((), ()))


def test_the_reference_says_that_core_ml_did_not_run() -> None:
    assert "not executed by Core ML" in (CoreMLReference.emulates or "")
    assert CoreMLRuntime.emulates is None


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="needs the extra 'apple'")
    with pytest.raises(ConversionError, match="is not a Core ML package"):
        CoreMLReference().open(tmp_path, Signature((), ()))
