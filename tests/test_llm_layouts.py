"""What `edgeopt llm` refuses before any work, and what it may overwrite."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeopt.bundle.destination import prepare_output
from edgeopt.bundle.llm_manifest import LLM, write_llm_manifest
from edgeopt.compression.steps import Qat
from edgeopt.config import RunConfig
from edgeopt.errors import ConversionError, EdgeoptError, MissingError, UsageError
from edgeopt.llm_layouts import write_layouts
from edgeopt.types import Generation

GENERATION = Generation("encoder-decoder", "translation", 9, (2,), (1,), 0, 8, 8, 1)


@pytest.fixture(autouse=True)
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> None:
        raise AssertionError("loaded the model first")

    monkeypatch.setattr("edgeopt.llm_layouts.load", load)


@pytest.mark.parametrize(
    ("target", "kind", "told"),
    [
        ((), UsageError, "no target given"),
        (("android-onnx-int8",), UsageError, "statically.*\n?.*android-onnx-w4"),
        (("android-executorch-int8",), UsageError, "statically"),
        (("android-int8",), UsageError, "statically"),
        (("ios-coreml-fp16",), UsageError, "no generator"),
        (("ethosu55-executorch-int8",), UsageError, "no generator"),
        (("android-fp16",), ConversionError, "integer weights"),
        (("android-nonsense",), UsageError, "android-nonsense"),
    ],
)
def test_refused_targets(target: tuple[str, ...], kind: type[EdgeoptError], told: str) -> None:
    with pytest.raises(kind) as caught:
        write_layouts(RunConfig(model="hf:absent", target=target))
    assert re.search(told, f"{caught.value} {caught.value.fix}")


def test_all_targets_are_looked_at_first() -> None:
    with pytest.raises(UsageError, match="statically"):
        write_layouts(RunConfig(model="hf:absent", target=("android-onnx-w4", "android-onnx-int8")))


def test_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="steps are not done here"):
        write_layouts(RunConfig(model="hf:absent", target=("android-onnx-w4",), step=(Qat(),)))


def test_builder_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.generation.llm_litert_file.find_spec", lambda _: None)
    with pytest.raises(MissingError, match="litert-lm-builder"):
        write_layouts(RunConfig(model="hf:absent", target=("android-int8-dynamic",)))


@pytest.mark.parametrize(("generation", "told"), [(None, "does not write"), (GENERATION, "is an encoder-decoder")])
def test_other_networks(monkeypatch: pytest.MonkeyPatch, generation: Generation | None, told: str) -> None:
    monkeypatch.setattr(
        "edgeopt.llm_layouts.load", lambda _: SimpleNamespace(name="net", module=None, generation=generation)
    )
    with pytest.raises(UsageError, match=told):
        write_layouts(RunConfig(model="hf:net", target=("android-onnx-w4",)))


def test_only_its_own_folder_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "net-w4-llm"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"network")
    with pytest.raises(UsageError, match="is in the way"):
        prepare_output(folder)
    write_llm_manifest(folder, SimpleNamespace(name="net", source_sha256="0" * 64), {"target": "w4"})  # type: ignore[arg-type]
    prepare_output(folder)
    (folder / "notes.txt").write_text("the user's own")
    with pytest.raises(UsageError, match="is in the way"):
        prepare_output(folder)


def test_note_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"network")
    model = SimpleNamespace(name="net", source_sha256="0" * 64)
    texts = []
    for _ in range(2):
        write_llm_manifest(tmp_path, model, {"target": "w4"})  # type: ignore[arg-type]
        texts.append((tmp_path / LLM).read_bytes())
    assert texts[0] == texts[1]
    assert LLM.encode() not in texts[0]
