"""The bundle of a network that writes: what is in it, and that its programs write the right tokens without edgeopt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

from edgeopt.bundle.generation import write_generation_bundle
from edgeopt.bundle.generation_contents import GoldenSequence
from edgeopt.bundle.generation_manifest import is_generation_bundle
from edgeopt.bundle.generation_reader import open_generation_bundle
from edgeopt.errors import ConversionError
from edgeopt.types import Generation

_spec = spec_from_file_location("generation_toys", Path(__file__).parent / "fixtures/generation_toys.py")
assert _spec is not None
assert _spec.loader is not None
toys = module_from_spec(_spec)
_spec.loader.exec_module(toys)
contents, expected, golden, text = toys.contents, toys.expected, toys.golden, toys.text
SPEAKER, TARGET, VOCABULARY, WRITER = toys.SPEAKER, toys.TARGET, toys.VOCABULARY, toys.WRITER


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    return write_generation_bundle(folder / "toy", contents(folder / "work")).path


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt: bringing a new one to disk takes a second."""
    return shutil.copytree(written, tmp_path / "toy")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def run(bundle: Path, script: str, *words: str) -> tuple[int, str, str]:
    """As on a machine without edgeopt: an import of it would fail."""
    alone = "import runpy, sys; sys.modules['edgeopt'] = None; sys.argv = sys.argv[1:]; "
    alone += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-I", "-c", alone, str(bundle / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


def test_round_trip(tmp_path: Path) -> None:
    made = contents(tmp_path / "work")
    final = tmp_path / "dist" / "toy"
    written = write_generation_bundle(final, made)
    assert (written.path, written.target, written.passed) == (final, TARGET, True)
    assert is_generation_bundle(final)
    loaded = open_generation_bundle(final)
    assert (loaded.name, loaded.device, loaded.status, loaded.format, loaded.precision) == (
        "toy", "raspberry-pi-5", "passed", "onnx", "fp32",
    )  # fmt: skip
    assert loaded.generation == WRITER
    assert loaded.target == made.target
    assert (loaded.beams, loaded.length_penalty) == (2, 0.6)
    assert (loaded.metric, loaded.metric_signature) == ("bleu", "nrefs:1|tok:13a")
    assert loaded.golden() == made.golden
    assert loaded.examples() == made.examples
    assert loaded.report() == made.report
    assert loaded.tokenizer == final / "tokenizer.json"
    assert loaded.preprocessing == replace(made.model.preprocessing, tokenizer=str(loaded.tokenizer))
    for name, inner in made.parts.items():
        assert loaded.parts[name].signature == inner.artifact.signature
        assert loaded.parts[name].report() == inner.report
    assert loaded.size_bytes == sum(inner.artifact.size_bytes for inner in made.parts.values())
    assert [path.name for path in final.rglob("tokenizer.json")] == ["tokenizer.json"]
    assert sorted(path.name for path in final.parent.iterdir()) == ["toy"]


def test_the_same_contents_give_the_same_bytes_and_hold_no_paths(tmp_path: Path) -> None:
    made = contents(tmp_path / "work")
    write_generation_bundle(tmp_path / "a", made)
    write_generation_bundle(tmp_path / "b", made)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for name, data in tree(tmp_path / "a").items():
        assert str(tmp_path).encode() not in data, name


@pytest.mark.parametrize("generation", [WRITER, SPEAKER], ids=["encoder-decoder", "decoder"])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_golden_sequences_are_written_again(tmp_path: Path, generation: Generation, beams: int) -> None:
    bundle = write_generation_bundle(tmp_path / "toy", contents(tmp_path / "work", beams, generation)).path
    code, output, errors = run(bundle, "check_generation.py")
    assert (code, output.splitlines()[-1]) == (0, "all sequences are the same"), output + errors
    open_generation_bundle(bundle)  # and nothing is left behind in it


def test_generate_prints_texts_and_json(bundle: Path) -> None:
    wanted = golden([4, 6], [9], WRITER, 2, 40)
    code, output, errors = run(bundle, "generate.py", "w4 w6", "w3 w8 w10 w12 w13 w14 w15 w16")
    assert (code, output.splitlines()[0]) == (0, wanted.text), errors
    code, output, errors = run(bundle, "generate.py", "w4 w6", "--beams", "1", "--max-new-tokens", "2", "--json")
    greedy = golden([4, 6], [9], WRITER, 1, 2)
    assert code == 0, errors
    assert json.loads(output) == [{"prompt": "w4 w6", "ids": list(greedy.ids), "text": greedy.text}]
    # A text that is too long is cut, the prefix included.
    cut = golden([3, 8, 10, 12, 13], [9], WRITER, 2, 40)
    _, output, _ = run(bundle, "generate.py", "w3 w8 w10 w12 w13 w14 w15 w16")
    assert output.strip() == cut.text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["w4", "--beams", "3"], "generate.py: 3 beams: the decoder has 2 rows"),
        (["w4", "--max-new-tokens", "0"], "generate.py: at least one token must be written"),
    ],
)
def test_generate_tells_in_one_line_what_it_can_not_do(bundle: Path, words: list[str], line: str) -> None:
    assert run(bundle, "generate.py", *words) == (2, "", f"{line}\n")


def test_a_network_that_hears_takes_arrays(tmp_path: Path) -> None:
    made = contents(tmp_path / "work")
    heard = {"input_ids": np.array([[4, 6, 3]]), "attention_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0]])}
    ids = expected([2, 5], [4, 6, 3], WRITER, 2, 6)
    made = replace(
        made,
        model=replace(made.model, preprocessing=None),
        tokenizer=tmp_path / "work",
        golden=(GoldenSequence(None, heard, tuple(ids), text(ids), 2, 40),),
    )
    bundle = write_generation_bundle(tmp_path / "toy", made).path
    assert run(bundle, "check_generation.py")[0] == 0
    loaded = open_generation_bundle(bundle)
    assert (loaded.preprocessing, loaded.tokenizer) == (None, bundle / "tokenizer.json")
    np.testing.assert_array_equal(loaded.golden()[0].inputs["input_ids"], heard["input_ids"])
    np.savez(tmp_path / "heard.npz", **heard)
    code, output, errors = run(bundle, "generate.py", str(tmp_path / "heard.npz"))
    assert (code, output.strip()) == (0, text(ids)), errors
    np.save(tmp_path / "heard.npy", heard["input_ids"])  # without its mask, which is then all ones
    code, output, errors = run(bundle, "generate.py", str(tmp_path / "heard.npy"))
    assert (code, output.strip()) == (0, text(ids)), errors
    np.savez(tmp_path / "other.npz", sound=heard["input_ids"])
    np.save(tmp_path / "long.npy", np.ones((1, 9), np.int64))
    for name, problem in (
        ("other.npz", "got sound, the encoder takes input_ids, attention_mask"),
        ("long.npy", "input_ids has the shape (1, 9), the encoder takes up to (1, 8)"),
    ):
        assert run(bundle, "generate.py", str(tmp_path / name)) == (2, "", f"generate.py: {problem}\n")


def test_without_a_tokenizer_ids_are_printed(tmp_path: Path) -> None:
    made = contents(tmp_path / "work", 1, SPEAKER)
    ids = expected([9, 4], None, SPEAKER, 1, 6)
    prompt = {"input_ids": np.array([[9, 4]])}
    made = replace(
        made,
        model=replace(made.model, preprocessing=None),
        golden=(GoldenSequence(None, prompt, tuple(ids), None, 1, 40),),
    )
    bundle = write_generation_bundle(tmp_path / "toy", made).path
    assert run(bundle, "check_generation.py")[0] == 0
    np.save(tmp_path / "prompt.npy", prompt["input_ids"])
    code, output, errors = run(bundle, "generate.py", str(tmp_path / "prompt.npy"))
    assert (code, output.split()) == (0, [str(token) for token in ids]), errors


def test_the_check_names_the_first_token_that_differs(tmp_path: Path) -> None:
    made = contents(tmp_path / "work")
    first = made.golden[0]
    wrong = replace(first, ids=(first.ids[0], (first.ids[1] + 1) % VOCABULARY, *first.ids[2:]))
    bundle = write_generation_bundle(tmp_path / "toy", replace(made, golden=(wrong, *made.golden[1:]))).path
    code, output, _ = run(bundle, "check_generation.py")
    assert code == 1
    problem = f"token 1 is {first.ids[1]} instead of {wrong.ids[1]}"
    assert output.splitlines()[0] == f"golden 0, {len(wrong.ids)} tokens: FAILED, {problem}"
    assert output.splitlines()[-1] == "1 sequences differ"


@pytest.mark.parametrize("name", ["tokenizer.json", "decoder/model.onnx", "encoder/manifest.json"])
def test_the_check_finds_damage(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes() + b" ")
    assert run(bundle, "check_generation.py")[:2] == (1, f"damaged or missing: {name}\n")


def test_the_readme_tells_the_loop_and_survives_any_text(bundle: Path) -> None:
    readme = (bundle / "README.md").read_text()
    assert "Put 'w9 ' before the text." in readme
    assert "The first tokens are [2, 5]" in readme
    assert "bleu 33.25 % (float network: 33.50 %) (nrefs:1|tok:13a)" in readme
    assert "| a \\| b | - | c d | \\<e\\> |" in readme
    assert json.loads((bundle / "generation.json").read_text())["loop"][-1].startswith("For beam search")


def test_parts_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    made = contents(tmp_path / "work")
    one_row = contents(tmp_path / "other", beams=1)
    mixed = replace(made, parts={**made.parts, "decoder": one_row.parts["decoder"]})
    alone = replace(made, parts={"decoder": made.parts["decoder"]})
    renamed = replace(made, model=replace(made.model, name="net"))
    for wrong, problem in ((mixed, "doesn't write 2 rows"), (alone, "has the parts"), (renamed, "'toy-encoder' for")):
        with pytest.raises(ConversionError, match=problem):
            write_generation_bundle(tmp_path / "dist" / "toy", wrong)
        assert not (tmp_path / "dist").exists()


def test_layers_that_were_cut_out_are_not_promised(tmp_path: Path) -> None:
    made = contents(tmp_path / "work")
    deeper = replace(made, generation=replace(WRITER, layers=3))
    bundle = write_generation_bundle(tmp_path / "toy", deeper).path
    assert open_generation_bundle(bundle).generation.layers == 1
