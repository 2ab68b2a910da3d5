"""`edgeopt inspect` of the bundle of a network that writes."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from edgeopt.bundle.generation import write_generation_bundle
from edgeopt.cli import main

_spec = spec_from_file_location("generation_toys", Path(__file__).parents[1] / "bundle/fixtures/generation_toys.py")
assert _spec is not None
assert _spec.loader is not None
toys = module_from_spec(_spec)
_spec.loader.exec_module(toys)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return write_generation_bundle(folder / "toy", toys.contents(folder / "work")).path


def test_its_parts_and_what_the_loop_must_know(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where 'edgeopt export' sends people once it is done."""
    assert main(["inspect", str(bundle)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    generation = toys.WRITER
    assert f"Cache {generation.max_target} tokens, {generation.layers} layers" in shown
    assert f"Reads up to {generation.max_source} tokens" in shown
    assert "Beams 2" in shown
    assert shown.index("encoder encoder/model.onnx fp32") < shown.index("decoder decoder/model.onnx fp32")
    assert f"edgeopt inspect {bundle / 'decoder'}" in shown
    assert main(["inspect", str(bundle / "decoder")]) == 0
    assert "past_key_0" in capsys.readouterr().out


def test_as_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"]["kind"] == "edgeopt-generation-bundle"
    assert set(document["parts"]) == {"encoder", "decoder"}


def test_a_zipped_one(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "toy.zip"
    assert main(["bundle", str(bundle), "--zip", "--output", str(archive)]) == 0
    assert main(["inspect", str(archive)]) == 0
    assert "its decoder, once it is unpacked" in capsys.readouterr().out
