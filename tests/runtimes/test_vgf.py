"""What the VGF runtime says is missing, and which file it opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeopt.errors import ConversionError, MissingError
from edgeopt.runtimes import vgf
from edgeopt.runtimes.vgf import VgfRuntime, program_beside
from edgeopt.types import Signature


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with ExecuTorch, a loader, a driver and the emulation layer's package."""
    (tmp_path / "lvp_icd.json").write_text("{}")
    monkeypatch.setattr(vgf.ExecuTorchRuntime, "unavailable", lambda _: None)
    monkeypatch.setattr(vgf, "find_library", "lib{}.so.1".format)
    monkeypatch.setattr(vgf, "find_spec", lambda _: object())
    monkeypatch.setattr(vgf, "_DRIVERS", (tmp_path,))
    monkeypatch.delenv("VK_INSTANCE_LAYERS", raising=False)
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)


@pytest.mark.usefixtures("driver")
def test_each_missing_piece_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "emulation_layer" in (VgfRuntime().unavailable() or "")
    monkeypatch.setenv("VK_INSTANCE_LAYERS", "VK_LAYER_ML_Graph_Emulation:VK_LAYER_ML_Tensor_Emulation")
    monkeypatch.setattr(vgf, "_is_built_in", lambda: False)
    assert "EXECUTORCH_BUILD_VGF" in (VgfRuntime().unavailable() or "")
    monkeypatch.setattr(vgf, "_is_built_in", lambda: True)
    assert VgfRuntime().unavailable() is None
    (tmp_path / "lvp_icd.json").unlink()
    assert "mesa-vulkan-drivers" in (VgfRuntime().unavailable() or "")
    monkeypatch.setattr(vgf, "find_library", lambda _: None)
    assert "libvulkan1" in (VgfRuntime().unavailable() or "")


@pytest.mark.usefixtures("driver")
def test_opening_without_them_is_a_missing_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vgf, "find_library", lambda _: None)
    with pytest.raises(MissingError, match="libvulkan1"):
        VgfRuntime().open(Path("model.pte"), Signature((), ()))


@pytest.mark.parametrize("name", ["model.tosa", "model.tosa.zip", "model.pte"])
def test_the_program_itself_runs_and_not_its_tosa_form(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.pte").write_bytes(b"program")
    assert program_beside(tmp_path / name) == tmp_path / "model.pte"


def test_a_tosa_form_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no \.pte file beside it"):
        program_beside(tmp_path / "model.tosa")
