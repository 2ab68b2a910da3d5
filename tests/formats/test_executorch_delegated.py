"""The Core ML delegate's flat package, and damaged delegates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeopt.formats.executorch_delegated import (
    COREML,
    COREML_MANIFEST,
    COREML_METADATA,
    COREML_MODEL,
    VULKAN,
    DelegatedOp,
    coreml_blob,
    coreml_files,
    operators,
)

SYMBOLS = {"a_to_fp16:const": [1], "conv_cast_fp16:conv": [3, 2], "y:linear": [5]}
FILES = {
    COREML_METADATA: b'{"identifier": "executorch_1"}',
    COREML_MANIFEST: b"{}",
    COREML_MODEL: b"\x08\x08model",
    "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin": bytes(range(256)),
    "debug_info.json": json.dumps({"debugSymbolToHandles": SYMBOLS}).encode(),
}


def test_a_package_survives_being_flattened() -> None:
    assert coreml_files(coreml_blob(FILES)) == FILES


def test_the_table_of_contents_is_last_and_backwards() -> None:
    blob = coreml_blob(FILES)
    assert blob.endswith(b'"sedon"{')
    table = json.loads(blob[::-1][: blob[::-1].index(b"}]}") + 3])
    assert table["nodes"][-1]["name"] == "lowered_module"
    assert table["nodes"][-1]["kind"] == 1


def test_vendor_reads_what_is_written(tmp_path: Path) -> None:
    vendor = pytest.importorskip("executorch.backends.apple.coreml.executorchcoreml", reason="needs its Core ML part")
    assert vendor.unflatten_directory_contents(coreml_blob(FILES), str(tmp_path))
    for name, content in FILES.items():
        assert (tmp_path / "lowered_module" / name).read_bytes() == content


def test_operators_without_constants() -> None:
    assert operators(COREML, coreml_blob(FILES)) == (DelegatedOp("conv", 2), DelegatedOp("linear", 5))


def test_without_debug_information_nothing_is_made_up() -> None:
    files = {name: content for name, content in FILES.items() if name != "debug_info.json"}
    assert operators(COREML, coreml_blob(files)) is None


def test_other_backends_are_not_read() -> None:
    assert operators("QnnBackend", b"anything") is None


@pytest.mark.parametrize("missing", [COREML_MODEL, COREML_MANIFEST, COREML_METADATA])
def test_a_package_without_a_model_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="without a model"):
        coreml_files(coreml_blob(FILES | {missing: b""}))


@pytest.mark.parametrize("blob", [b"", b"{}", coreml_blob(FILES)[100:], coreml_blob(FILES)[:-20]])
def test_damaged_packages(blob: bytes) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        operators(COREML, blob)


@pytest.mark.parametrize("blob", [b"", b"\0\0\0\0VH00" + bytes(30), b"\0\0\0\0VH00\x1e\0 \0\0\0\xff\xff\0\0"])
def test_damaged_shaders(blob: bytes) -> None:
    with pytest.raises(ValueError):
        operators(VULKAN, blob)
