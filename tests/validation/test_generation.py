from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeopt.errors import ConversionError, DataError, UsageError
from edgeopt.progress import Silent
from edgeopt.types import Array, Artifact, Finding, Gates, Generation, PartName, Sample, Signature, SignatureTensor
from edgeopt.validation.generation import GenerationTerms, Proof, prove_generation
from edgeopt.validation.generation_samples import assignment_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")

SOURCE = ROWS = 8
WORDS = ["<pad>", "</s>", "<s>", "ein", "Hund", "Mann", "schläft", "singt", "laut", "auf", "dem", "Sofa"]
PAD, END, START = 0, 1, 2
TEXTS = ["ein Hund schläft", "ein Mann singt laut", "ein Hund schläft auf dem Sofa", "dem Mann singt ein Hund"]
GENERATION = Generation("encoder-decoder", "translation", len(WORDS), (START,), (END,), PAD, SOURCE, ROWS, 1)
#: How sure the toy network is of its token.
SURE = 5.0


def tokens_of(text: str) -> list[int]:
    return [*map(WORDS.index, text.split()), END]


def copier(folder: Path, table: Mapping[str, str], precision: str = "fp32") -> dict[PartName, Artifact]:
    """A network that writes the source again, but `table`'s words as others. Its memory is the source's tokens; the
    decoder looks up the one at its position."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, kind: int, *shape: int) -> object:
        return helper.make_tensor_value_info(name, kind, shape)

    def constant(name: str, array: Array) -> object:
        return numpy_helper.from_array(array, name)

    folder.mkdir()
    integer, real, node = TensorProto.INT64, TensorProto.FLOAT, helper.make_node
    written = np.arange(len(WORDS))
    for word, other in table.items():
        written[WORDS.index(word)] = WORDS.index(other)
    memory_shape, row_shape = np.array([1, 1, SOURCE, 1]), np.array([1, 1, 1, 1])
    encoder = helper.make_graph(
        [
            node("Cast", ["input_ids"], ["cast"], to=real),
            node("Mul", ["cast", "one"], ["kept"]),
            node("Reshape", ["kept", "shape"], ["memory_key_0"]),
        ],
        "encoder",
        [value("input_ids", integer, 1, SOURCE)],
        [value("memory_key_0", real, 1, 1, SOURCE, 1)],
        [constant("shape", memory_shape), constant("one", np.array(1, np.float32))],
    )
    decoder = helper.make_graph(
        [
            node("Gather", ["memory_key_0", "position"], ["found"], axis=2),
            node("Cast", ["found"], ["wanted"], to=integer),
            node("Reshape", ["wanted", "flat"], ["row"]),
            node("Gather", ["table", "row"], ["written"]),
            node("OneHot", ["written", "depth", "scores"], ["logits"]),
            node("Cast", ["token"], ["read"], to=real),
            node("ReduceMax", ["past_key_0"], ["highest"], keepdims=0),
            node("Mul", ["highest", "nothing"], ["unused"]),
            node("Add", ["read", "unused"], ["sum"]),
            node("Reshape", ["sum", "one_row"], ["present_key_0"]),
        ],
        "decoder",
        [
            value("token", integer, 1, 1),
            value("position", integer, 1),
            value("memory_key_0", real, 1, 1, SOURCE, 1),
            value("past_key_0", real, 1, 1, ROWS, 1),
        ],
        [value("logits", real, 1, len(WORDS)), value("present_key_0", real, 1, 1, 1, 1)],
        [
            constant("flat", np.array([1])),
            constant("one_row", row_shape),
            constant("table", written),
            constant("depth", np.array(len(WORDS))),
            constant("scores", np.array([0, SURE], np.float32)),
            constant("nothing", np.array(0, np.float32)),
        ],
    )
    return {
        part: artifact(folder / f"{part}.onnx", graph, precision)
        for part, graph in (("encoder", encoder), ("decoder", decoder))
    }


def artifact(path: Path, graph: object, precision: str) -> Artifact:
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)

    def tensors(values: Sequence) -> tuple[SignatureTensor, ...]:
        found = []
        for value in values:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value for d in kind.shape.dim)
            dtype = "int64" if kind.elem_type == onnx.TensorProto.INT64 else "float32"
            found.append(SignatureTensor(value.name, value.name, shape, dtype, dtype))
        return tuple(found)

    signature = Signature(tensors(model.graph.input), tensors(model.graph.output))
    return Artifact(path, "onnx", precision, signature, path.stat().st_size, "0" * 64, (), {}, ())


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="ein"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(WORDS[:3])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def samples(texts: Sequence[str] = TEXTS) -> Iterator[Sample]:
    for number, text in enumerate(texts):
        ids = np.array([tokens_of(text)])
        inputs = {"input_ids": ids, "decoder_input_ids": np.array([[START, *tokens_of(text)[:-1]]])}
        yield Sample(inputs, ids, f"row {number}", (text,))


@pytest.fixture
def terms(tokenizer: Path) -> GenerationTerms:
    return GenerationTerms(
        model="copier",
        target="android-onnx-int8",
        runtime="onnxruntime",
        generation=GENERATION,
        tokenizer=tokenizer,
        samples=samples,
        count=len(TEXTS),
        origin="four sentences",
        metric="bleu",
        gates=Gates(),
        required_gates=frozenset(),
        advice={},
        budget_s=0.1,
    )


def prove(shipped: dict, twin: dict | None, terms: GenerationTerms, findings: tuple[Finding, ...] = ()) -> Proof:
    return prove_generation(shipped, twin, terms, findings, Silent())


def figures(proof: Proof, subject: str) -> dict[str, float]:
    return {m.name: m.value for m in proof.report.measurements if m.subject == subject}


def test_a_network_as_good_as_its_twin(tmp_path: Path, terms: GenerationTerms) -> None:
    twin, shipped = copier(tmp_path / "float", {}), copier(tmp_path / "int8", {}, "w8a8")
    limits = Gates(max_accuracy_drop=0.01, min_accuracy_kept=0.99, min_agreement=1.0, max_latency_ms=1e4)
    proof = prove(shipped, twin, replace(terms, gates=limits), (Finding("kept", "here", "as it was"),))
    report = proof.report
    assert report.status == "passed", [check for check in report.checks if not check.passed]
    before, after = figures(proof, "float"), figures(proof, "quantized")
    assert before["bleu"] == after["bleu"] == pytest.approx(1)
    assert after["chrf"] == pytest.approx(1)
    assert after["agreement"] == 1
    assert "agreement" not in before
    shared = {"latency_ms", "time_to_first_token_ms", "encoder_latency_ms", "decoder_step_ms", "tokens_per_second"}
    assert shared | {"peak_memory_bytes", "cache_bytes", "size_bytes"} <= set(before) & set(after)
    assert after["cache_bytes"] == 4 * (SOURCE + ROWS)
    assert after["size_bytes"] == sum(part.path.stat().st_size for part in shipped.values())
    assert 0 < after["encoder_latency_ms"] < after["time_to_first_token_ms"] < after["latency_ms"]
    timed = [m for m in report.measurements if m.unit in ("ms", "x", "tokens/s")]
    assert all(m.spread is not None and m.threads == 1 and m.provenance == "measured-host" for m in timed)
    assert report.findings[0].code == "kept"
    assert "nrefs:1" in str(report.evaluation["metric_signature"])
    assert all(timing.name.startswith("decoder/") for timing in report.op_timings)
    example = proof.examples[0]
    assert (example.source, example.reference) == (TEXTS[0], TEXTS[0])
    assert (example.float_text, example.text) == (TEXTS[0], TEXTS[0])
    assert len(proof.examples) == 4


def test_a_network_that_got_worse(tmp_path: Path, terms: GenerationTerms) -> None:
    """One word of 21 tokens is another: the twin's way being given, only that one is wrong."""
    twin, shipped = copier(tmp_path / "float", {}), copier(tmp_path / "int8", {"laut": "auf"}, "w8a8")
    limits = Gates(max_accuracy_drop=0.001, min_accuracy_kept=0.999, min_agreement=0.99)
    advice = {"agreement": "try w8a16"}
    proof = prove(shipped, twin, replace(terms, gates=limits, advice=advice))
    total = sum(len(tokens_of(text)) for text in TEXTS)
    assert figures(proof, "quantized")["agreement"] == pytest.approx(1 - 1 / total)
    checks = {check.name: check for check in proof.report.checks}
    assert proof.report.status == "failed"
    assert not checks["accuracy_drop"].passed
    assert not checks["accuracy_kept"].passed
    assert checks["agreement"].advice == "try w8a16"
    assert proof.examples[1].text == "ein Mann singt auf"
    assert proof.examples[1].float_text == TEXTS[1]


def test_texts_without_an_end_and_without_words(tmp_path: Path, terms: GenerationTerms) -> None:
    twin = copier(tmp_path / "float", {})
    endless = prove(copier(tmp_path / "endless", {"</s>": "ein", "<pad>": "ein"}, "w8a8"), twin, terms)
    found = {finding.code: finding.message for finding in endless.report.findings}
    assert found["never-ends"] == (
        "4 of 4 texts were cut at the cache's end without an end token (of the float network 0)"
    )
    silent = prove(copier(tmp_path / "silent", dict.fromkeys(WORDS[3:], "</s>"), "w8a8"), twin, terms)
    found = {finding.code: finding.message for finding in silent.report.findings}
    assert found["empty-text"] == "4 of 4 texts are empty (of the float network 0)"


def test_the_float_network_itself(tmp_path: Path, terms: GenerationTerms) -> None:
    gates = Gates(max_accuracy_drop=0.1, min_speedup=1.5, max_size_bytes=10)
    limited = replace(terms, gates=gates, required_gates=frozenset({"min_speedup"}), metric="exact-match")
    proof = prove(copier(tmp_path / "float", {}), None, limited)
    assert {m.subject for m in proof.report.measurements} == {"float"}
    assert figures(proof, "float")["exact-match"] == 1
    checks = {check.name: check for check in proof.report.checks}
    assert "accuracy_drop" not in checks
    assert checks["speedup"].advice == "could not be measured: there is no float twin to time beside it"
    assert not checks["size_bytes"].passed
    assert proof.examples[0].float_text == proof.examples[0].text == TEXTS[0]


def test_perplexity(tmp_path: Path, terms: GenerationTerms) -> None:
    """Right tokens have the probability e^5 / (e^5 + 11), wrong ones 1 / (e^5 + 11)."""
    twin, shipped = copier(tmp_path / "float", {}), copier(tmp_path / "int8", {"laut": "auf"}, "w8a8")
    gates = Gates(max_accuracy_drop=0.1, min_accuracy_kept=0.5)
    proof = prove(shipped, twin, replace(terms, metric="perplexity", tokenizer=None, gates=gates))
    normal = math.exp(SURE) + len(WORDS) - 1
    total = sum(len(tokens_of(text)) for text in TEXTS)
    before, after = figures(proof, "float"), figures(proof, "quantized")
    assert before["perplexity"] == pytest.approx(normal / math.exp(SURE), rel=1e-5)
    assert after["perplexity"] == pytest.approx(before["perplexity"] * math.exp(SURE / total), rel=1e-5)
    assert after["agreement"] == pytest.approx(1 - 1 / total)
    checks = {check.name: check for check in proof.report.checks}
    assert checks["accuracy_kept"].measured == pytest.approx(before["perplexity"] / after["perplexity"])
    assert not checks["accuracy_drop"].passed
    assert proof.examples == ()


def test_word_errors_are_judged_by_right_words(tmp_path: Path, terms: GenerationTerms) -> None:
    twin, shipped = copier(tmp_path / "float", {}), copier(tmp_path / "int8", {"laut": "auf"}, "w8a8")
    limits = Gates(max_accuracy_drop=0.5, min_accuracy_kept=0.5)
    proof = prove(shipped, twin, replace(terms, metric="wer", gates=limits))
    words = sum(len(text.split()) for text in TEXTS)
    assert figures(proof, "quantized")["wer"] == pytest.approx(1 / words)
    checks = {check.name: check.measured for check in proof.report.checks}
    assert checks["accuracy_drop"] == pytest.approx(1 / words)
    assert checks["accuracy_kept"] == pytest.approx(1 - 1 / words)


def test_a_required_limit_without_a_metric(tmp_path: Path, terms: GenerationTerms) -> None:
    network = copier(tmp_path / "float", {})
    limited = replace(
        terms, metric=None, gates=Gates(min_accuracy_kept=0.9), required_gates=frozenset({"min_accuracy_kept"})
    )
    with pytest.raises(UsageError, match="min-accuracy-kept: can't be measured: the evaluation data have no texts"):
        prove(network, None, limited)
    switched_off = replace(limited, gates=Gates())
    assert prove(network, None, switched_off).report.status == "passed"


def test_texts_cannot_be_judged_without_a_tokenizer(tmp_path: Path, terms: GenerationTerms) -> None:
    with pytest.raises(UsageError, match=r"metric 'bleu': judges texts, and the network has no tokenizer\.json"):
        prove(copier(tmp_path / "float", {}), None, replace(terms, tokenizer=None))


def test_samples_that_lack_what_the_metric_needs(tmp_path: Path, terms: GenerationTerms) -> None:
    network = copier(tmp_path / "float", {})
    bare = [Sample(sample.inputs, None, sample.name) for sample in samples()]
    with pytest.raises(DataError, match="sample 'row 0': has no reference text, which the metric bleu needs"):
        prove(network, None, replace(terms, samples=lambda: iter(bare)))
    with pytest.raises(DataError, match="sample 'row 0': has no label to be predicted"):
        prove(network, None, replace(terms, samples=lambda: iter(bare), metric="perplexity"))
    with pytest.raises(DataError, match="evaluation data: holds no samples"):
        prove(network, None, replace(terms, samples=lambda: iter(())))


def test_a_text_of_one_token_leaves_nothing_to_predict(tmp_path: Path, terms: GenerationTerms) -> None:
    network = copier(tmp_path / "float", {})
    short = replace(next(samples()), label=np.array([[-100]]))
    mixed = replace(terms, samples=lambda: iter([short, *samples()]), metric="perplexity")
    alone = replace(mixed, samples=lambda: iter([short]))
    with_it, without = prove(network, None, mixed), prove(network, None, replace(mixed, samples=samples))
    assert figures(with_it, "float")["perplexity"] == pytest.approx(figures(without, "float")["perplexity"])
    with pytest.raises(DataError, match="holds no text to be predicted"):
        prove(network, None, alone)


def test_where_there_are_no_texts_the_labels_tokens_are_the_reference(tmp_path: Path, terms: GenerationTerms) -> None:
    """As in a .npz file of sounds."""
    told = [replace(sample, references=()) for sample in samples()]
    proof = prove(copier(tmp_path / "float", {}), None, replace(terms, samples=lambda: iter(told), metric="wer"))
    assert figures(proof, "float")["wer"] == 0
    assert proof.examples[0].reference == TEXTS[0]


def test_a_file_that_is_refused(tmp_path: Path, terms: GenerationTerms) -> None:
    network = copier(tmp_path / "float", {})
    network["decoder"].path.write_bytes(b"nothing")
    with pytest.raises(ConversionError, match="ONNX Runtime refuses the file"):
        prove(network, None, terms)


CONTINUES = replace(GENERATION, kind="decoder", start_ids=())


def test_the_prompt_of_a_pair_is_what_the_label_skips() -> None:
    ids, label = np.array([[3, 4, 5, 6, 1]]), np.array([[-100, -100, 5 + 1, 1, -100]])
    found = assignment_of(Sample({"input_ids": ids}, label, "row", ("schläft",)), CONTINUES, None)
    assert found.inputs["input_ids"].tolist() == found.given["input_ids"].tolist() == [[3, 4, 5]]
    assert found.told == (6, 1)
    assert found.references == ("schläft",)


def test_the_first_half_of_a_text_that_is_its_own_target_is_the_prompt() -> None:
    ids = np.array([[3, 4, 5, 6, 7, PAD, PAD]])
    label = np.array([[4, 5, 6, 7, -100, -100, -100]])
    found = assignment_of(Sample({"input_ids": ids}, label, "row"), CONTINUES, None)
    assert found.inputs["input_ids"].tolist() == [[3, 4]]
    assert found.given["input_ids"].tolist() == [[3]]
    assert found.told == (4, 5, 6, 7)
