"""What the ExecuTorch runtime says before it runs anything; running is tested in tests/e2e/test_executorch.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import ConversionError, DataError
from edgeopt.runtimes.executorch import ExecuTorchRuntime, _tensor
from edgeopt.types import Signature, SignatureTensor

IMAGE = SignatureTensor("image", "input_0", ("batch", 3, 4, 4), "float32", "float32")


def test_available_here() -> None:
    assert ExecuTorchRuntime().unavailable() is None


def test_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.runtimes.executorch.find_spec", lambda _: None)
    reason = ExecuTorchRuntime().unavailable()
    assert reason is not None
    assert "pip install executorch" in reason


@pytest.mark.parametrize("content", [b"", b"not a program at all, but long enough to have a header" * 4])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pte"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"broken\.pte: ExecuTorch refuses the file"):
        ExecuTorchRuntime().open(path, Signature((), ()))


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (3, 4, 4)])
def test_a_wrong_shape_names_the_input(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="input 'image': has shape"):
        _tensor(np.zeros(shape, np.float32), IMAGE)


def test_read_only_arrays_are_taken() -> None:
    values = np.ones((2, 3, 4, 4), np.float32)
    values.flags.writeable = False
    assert _tensor(values, IMAGE).shape == (2, 3, 4, 4)
