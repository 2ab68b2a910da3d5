"""Archives of TOSA graphs and portable programs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.runtimes.tosa_program import open_program, tosa_graphs
from edgeopt.types import Signature, SignatureTensor


def tensor(name: str) -> SignatureTensor:
    return SignatureTensor(name, name, (2,), "float32", "float32")


SWAP = Signature((tensor("a"), tensor("b")), (tensor("first"), tensor("second")))


def archive(path: Path, content: object, **parts: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("program.json", content if isinstance(content, str) else json.dumps(content))
        for name, data in parts.items():
            file.writestr(name.replace("_", "."), data)
    return path


def test_values_go_by_the_programs_names_and_come_by_the_signatures(tmp_path: Path) -> None:
    content = {"inputs": ["x", "y"], "outputs": ["y", "x"], "steps": []}
    inputs = {"a": np.float32([1, 2]), "b": np.float32([3, 4])}
    with open_program(archive(tmp_path / "model.tosa.zip", content), SWAP) as session:
        outputs = session.run(inputs)
    assert outputs["first"].tolist() == [3, 4]
    assert outputs["second"].tolist() == [1, 2]
    with pytest.raises(DataError, match="closed"):
        session.run(inputs)


@pytest.mark.parametrize(
    "content",
    ["no json", {"inputs": []}, {"inputs": [], "outputs": [], "steps": [{"file": "a", "reads": [], "makes": []}]}],
)
def test_a_damaged_archive_is_a_usage_error(tmp_path: Path, content: object) -> None:
    with pytest.raises(UsageError, match="not a readable TOSA program"):
        open_program(archive(tmp_path / "model.tosa.zip", content), SWAP)


def test_something_that_is_no_archive_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "model.tosa.zip").write_bytes(b"TOSA")
    with pytest.raises(UsageError, match="not a readable TOSA program"):
        tosa_graphs(tmp_path / "model.tosa.zip")


def test_a_signature_of_another_file_is_refused(tmp_path: Path) -> None:
    content = {"inputs": ["x"], "outputs": ["x"], "steps": []}
    with pytest.raises(ConversionError, match="1 inputs and 1 outputs"):
        open_program(archive(tmp_path / "model.tosa.zip", content), SWAP)


def test_graphs_come_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    steps = [{"file": f"{name}.tosa", "reads": [], "makes": []} for name in ("two", "one")]
    path = archive(tmp_path / "m.tosa.zip", {"inputs": [], "outputs": [], "steps": steps}, one_tosa=b"1", two_tosa=b"2")
    assert tosa_graphs(path) == (b"2", b"1")
    single = tmp_path / "m.tosa"
    single.write_bytes(b"graph")
    assert tosa_graphs(single) == (b"graph",)
