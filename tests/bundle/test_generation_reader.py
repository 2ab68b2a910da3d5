"""What open_generation_bundle refuses: everything that was changed, added, removed or makes no sense."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from edgeopt.bundle import open_bundle
from edgeopt.bundle.generation import write_generation_bundle
from edgeopt.bundle.generation_manifest import is_generation_bundle
from edgeopt.bundle.generation_reader import open_generation_bundle
from edgeopt.errors import TamperedError, UsageError
from edgeopt.report_file import seal

_spec = spec_from_file_location("generation_toys", Path(__file__).parent / "fixtures/generation_toys.py")
assert _spec is not None
assert _spec.loader is not None
toys = module_from_spec(_spec)
_spec.loader.exec_module(toys)
contents = toys.contents


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return write_generation_bundle(folder / "toy", contents(folder / "work")).path


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt: bringing a new one to disk takes a second."""
    return shutil.copytree(written, tmp_path / "toy")


def rewritten(bundle: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """Change generation.json and bind the report to it again, as somebody would who knows the format."""
    settings = json.loads((bundle / "generation.json").read_text())
    change(settings)
    (bundle / "generation.json").write_text(json.dumps(settings))
    report = json.loads((bundle / "report.json").read_text())
    report["manifest_sha256"] = hashlib.sha256((bundle / "generation.json").read_bytes()).hexdigest()
    report["sha256"] = seal(report)
    (bundle / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.update(beams=3), "has a decoder that doesn't write 3 rows of 23 tokens"),
        (lambda s: s.update(size_bytes=7), "says that the models take 7 bytes"),
        (lambda s: s["generation"].update(layers=2), "has 2 layers, and a decoder with another cache"),
        (lambda s: s["generation"].update(max_target=9), "has the cache past_key_0 of (2, 1, 7, 1)"),
        (lambda s: s["generation"].update(end_ids=[23]), "speaks of the token 23; there are 23"),
        (lambda s: s["generation"].update(start_ids=[]), "has 0 start_ids for a cache of 7 rows"),
        (lambda s: s["generation"].update(kind="decoder"), "has the parts"),
        (lambda s: s["parts"]["encoder"].update(folder="../elsewhere"), "says that the part 'encoder' is in '../else"),
        (lambda s: s["parts"]["encoder"].update(manifest_sha256="0"), "is not the one that generation.json speaks of"),
        (lambda s: s["files"].update({"../x": s["files"]["README.md"]}), "leads out of the bundle's own folder"),
        (lambda s: s["files"].update({"encoder/x": s["files"]["README.md"]}), "leads out of the bundle's own folder"),
        (lambda s: s["files"].pop("tokenizer.json"), "speaks of 'tokenizer.json', which `files` does not list"),
        (lambda s: s["preprocessing"].update(tokenizer="/etc"), "has the tokenizer '/etc'"),
        (lambda s: s.update(length_penalty="much"), "length_penalty"),
        (lambda s: s.update(schema_version=2), "has schema version 2, this edgeopt reads 1"),
        (lambda s: s.update(kind="x"), "is not the description of a network that writes"),
        (lambda s: s.update(status="failed"), "says 'passed', and generation.json 'failed'"),
    ],
)
def test_contradictions_are_refused(
    bundle: Path, change: Callable[[dict[str, dict[str, object]]], object], problem: str
) -> None:
    rewritten(bundle, change)
    with pytest.raises(UsageError) as caught:
        open_generation_bundle(bundle)
    assert problem in caught.value.line()


@pytest.mark.parametrize("name", ["generate.py", "golden.jsonl", "encoder/model.onnx", "decoder/README.md"])
def test_a_changed_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes() + b"\n")
    with pytest.raises(TamperedError) as caught:
        open_generation_bundle(bundle)
    assert caught.value.where == str(bundle / name)


@pytest.mark.parametrize("name", ["notes.txt", "golden/extra.npy", "encoder/notes.txt"])
def test_an_added_file_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("mine")
    with pytest.raises(TamperedError, match="remove it from the bundle"):
        open_generation_bundle(bundle)


@pytest.mark.parametrize("name", ["README.md", "report.json", "encoder/model.onnx"])
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(TamperedError, match="is missing from the bundle") as caught:
        open_generation_bundle(bundle)
    assert caught.value.where == str(bundle / name)


def test_a_part_that_is_a_link_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "decoder", tmp_path / "elsewhere")
    (bundle / "decoder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TamperedError, match="is a link"):
        open_generation_bundle(bundle)


def test_a_part_of_another_network_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = write_generation_bundle(tmp_path / "other", contents(tmp_path / "work", beams=1)).path
    shutil.rmtree(bundle / "decoder")
    shutil.copytree(other / "decoder", bundle / "decoder")
    with pytest.raises(TamperedError, match=r"is not the one that generation\.json speaks of"):
        open_generation_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"prompt": None}, "has a text as well as arrays, or neither"),
        ({"ids": [99]}, "has a token that the vocabulary hasn't"),
        ({"beams": 5}, "has 5 beams and 3 tokens"),
        ({"prompt": None, "inputs": {"x": "/etc/passwd"}}, "speaks of '/etc/passwd', which generation.json does not"),
        ({"prompt": None, "inputs": {"x": "README.md"}}, "is no array"),
        ({"ids": "many"}, "ids"),
    ],
)
def test_a_golden_line_that_makes_no_sense_is_named(bundle: Path, change: dict[str, object], problem: str) -> None:
    first = (bundle / "golden.jsonl").read_text().split("\n")[0]
    line = json.dumps(json.loads(first) | change) + "\n"
    (bundle / "golden.jsonl").write_text(f"{first}\n{line}")
    data = (bundle / "golden.jsonl").read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
    rewritten(bundle, lambda settings: settings["files"].update({"golden.jsonl": entry}))
    with pytest.raises(UsageError) as caught:
        open_generation_bundle(bundle).golden()
    assert problem in caught.value.line()
    assert str(bundle / "README.md") in caught.value.line() or "golden.jsonl: line 2" in caught.value.line()


def test_what_is_no_such_bundle_is_told_apart(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is an ordinary bundle, or a part of one"):
        open_generation_bundle(bundle / "encoder")
    with pytest.raises(UsageError, match=r"it has no generation\.json"):
        open_generation_bundle(tmp_path)
    with pytest.raises(UsageError, match="is not a bundle directory"):
        open_generation_bundle(bundle / "README.md")
    assert not is_generation_bundle(bundle / "encoder")
    assert open_bundle(bundle / "encoder").preprocessing is None
