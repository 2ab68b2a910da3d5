"""What is in a bundle, that it comes back, and that nothing else is believed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeopt.bundle import BundleContents, GoldenVector, open_bundle, write_bundle
from edgeopt.device_profiles import load_device
from edgeopt.errors import TamperedError, UsageError
from edgeopt.formats.files import sha256_of
from edgeopt.report_file import seal
from edgeopt.targets import load_target
from edgeopt.types import (
    Artifact,
    AudioPreprocessing,
    Format,
    ImagePreprocessing,
    Model,
    QuantParams,
    Report,
    Signature,
    SignatureTensor,
    StepRecord,
    TensorSpec,
    TextPreprocessing,
)

IMAGE = ImagePreprocessing(height=2, width=3, rescale=1.0, mean=(127.0,), std=(128.0,), crop_fraction=0.875)


def doubling_model(path: Path) -> None:
    """y = x + x: a real file that ONNX Runtime runs."""
    x = helper.make_tensor_value_info("in/x:0", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Add", ["in/x:0", "in/x:0"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


def contents(folder: Path) -> BundleContents:
    path = folder / "made.onnx"
    doubling_model(path)
    data = path.read_bytes()
    signature = Signature(
        inputs=(SignatureTensor("image", "in/x:0", (1, 4), "float32", "float32"),),
        outputs=(SignatureTensor("scores", "y", (1, 4), "float32", "float32"),),
    )
    artifact = Artifact(
        path=path,
        format="onnx",
        precision="w8a8",
        signature=signature,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        history=(StepRecord("export", {"opset": 18, "fold": True, "scale": 0.5, "note": None}),),
        tools={"onnxruntime": "1.31.1", "edgeopt": "0.1.0"},
        unquantized_ops=(),
    )
    model = Model(
        name="net",
        module=None,
        native=None,
        inputs=(TensorSpec("image", (1, 4), "float32"),),
        outputs=(TensorSpec("scores", (1, 4), "float32"),),
        example_inputs={},
        preprocessing=IMAGE,
        labels=("cat", "dog\nhouse"),
        history=(),
        source_sha256="0" * 64,
    )
    x = np.array([[1.0, -2.0, 3.5, 0.0]], np.float32)
    golden = GoldenVector({"image": x}, {"scores": x + x}, {"scores": x + x}, label=1)
    return BundleContents(
        target=load_target("android-onnx-int8"),
        device=load_device("pixel-6"),
        model=model,
        artifact=artifact,
        float_artifact=artifact,
        report=Report("passed", "net", "android-onnx-int8", "onnxruntime", (), (), (), (), (), {}),
        golden=(golden, replace(golden, label=None), replace(golden, label=np.array([1, 2], np.int64))),
    )


@pytest.fixture
def made(tmp_path: Path) -> BundleContents:
    (tmp_path / "work").mkdir()
    return contents(tmp_path / "work")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_round_trip(made: BundleContents, tmp_path: Path) -> None:
    final = tmp_path / "dist" / "net-android-onnx-int8"
    bundle = write_bundle(final, made)
    assert (bundle.path, bundle.target, bundle.passed) == (final, "android-onnx-int8", True)
    loaded = open_bundle(final)
    assert loaded.signature == made.artifact.signature == loaded.float_signature
    assert loaded.target == made.target
    assert loaded.gates == made.target.gates
    assert (loaded.name, loaded.format, loaded.precision, loaded.status) == ("net", "onnx", "w8a8", "passed")
    assert loaded.preprocessing == IMAGE
    assert loaded.labels == made.model.labels
    assert loaded.history == made.artifact.history
    assert loaded.report() == made.report
    assert loaded.model_path.read_bytes() == made.artifact.path.read_bytes()
    assert loaded.float_path is not None
    assert loaded.float_path.name == "model_fp32.onnx"
    for original, stored in zip(made.golden, loaded.golden(), strict=True):
        np.testing.assert_array_equal(stored.inputs["image"], original.inputs["image"])
        np.testing.assert_array_equal(stored.outputs["scores"], original.outputs["scores"])
        np.testing.assert_array_equal(stored.reference["scores"], original.reference["scores"])
        np.testing.assert_array_equal(stored.label, original.label)
    assert (final / "labels.txt").read_text() == "cat\ndog house\n"
    assert sorted(p.name for p in final.parent.iterdir()) == [final.name]


def test_the_same_contents_give_the_same_bytes_and_hold_no_paths(made: BundleContents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "a", made)
    write_bundle(tmp_path / "b", made)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for name, data in tree(tmp_path / "a").items():
        assert str(tmp_path).encode() not in data, name


def test_manifest_lists_every_other_file(made: BundleContents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", made)
    files = tree(tmp_path / "b")
    manifest = json.loads(files["manifest.json"])
    assert set(manifest["files"]) == set(files) - {"manifest.json", "report.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size_bytes": len(files[name])}
    report = json.loads(files["report.json"])
    assert report["manifest_sha256"] == hashlib.sha256(files["manifest.json"]).hexdigest()


def test_a_chart_is_no_part_of_what_repeats(made: BundleContents, tmp_path: Path) -> None:
    plain = write_bundle(tmp_path / "plain", made)
    charted = write_bundle(tmp_path / "charted", replace(made, chart=b"<svg>0.31 ms</svg>"))
    assert (charted.path / "steps.svg").read_bytes() == b"<svg>0.31 ms</svg>"
    assert set(tree(charted.path)) - set(tree(plain.path)) == {"steps.svg"}
    assert "steps.svg" in (charted.path / "README.md").read_text()
    other = write_bundle(tmp_path / "other", replace(made, chart=b"<svg>0.32 ms</svg>"))
    assert (charted.path / "manifest.json").read_bytes() == (other.path / "manifest.json").read_bytes()
    open_bundle(charted.path)
    write_bundle(tmp_path / "charted", made)  # an own bundle, to be replaced
    assert not (tmp_path / "charted" / "steps.svg").exists()


def test_a_sparsified_model_travels_packed_too(made: BundleContents, tmp_path: Path) -> None:
    history = (*made.artifact.history, StepRecord("sparsify", {"zeros": 0.8}))
    bundle = write_bundle(tmp_path / "b", replace(made, artifact=replace(made.artifact, history=history)))
    model = open_bundle(bundle.path).model_path
    command = [sys.executable, str(bundle.path / "unpack.py"), f"{model}.packed", str(tmp_path / "restored")]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "restored").read_bytes() == model.read_bytes()
    assert (bundle.path / "unpack.hpp").is_file()
    assert f"| as it is | {model.stat().st_size} |" in (bundle.path / "README.md").read_text()


def test_a_bundle_without_twin_labels_and_preprocessing(made: BundleContents, tmp_path: Path) -> None:
    bare = replace(
        made, float_artifact=None, golden=made.golden[:1], model=replace(made.model, labels=(), preprocessing=None)
    )
    write_bundle(tmp_path / "b", bare)
    loaded = open_bundle(tmp_path / "b")
    assert loaded.float_path is None
    files = [name for name in sorted(tree(tmp_path / "b")) if "/" not in name]
    assert files == [
        "LICENCES.md",
        "README.md",
        "check.py",
        "manifest.json",
        "model.onnx",
        "report.json",
        "sbom.cdx.json",
    ]
    assert "without declared preprocessing" in (tmp_path / "b" / "README.md").read_text()


def test_arrays_of_every_kind_come_back(made: BundleContents, tmp_path: Path) -> None:
    arrays = {
        "a/b": np.array(True),
        "a:b": np.zeros((0, 3), np.int64),
        "A_b": np.arange(6, dtype=">i4").reshape(2, 3).T,
        "ä": np.array([np.nan, np.inf], np.float16),
    }
    inputs = tuple(
        SignatureTensor(name, name, array.shape, array.dtype.name, array.dtype.name) for name, array in arrays.items()
    )
    artifact = replace(made.artifact, signature=replace(made.artifact.signature, inputs=inputs))
    vector = replace(made.golden[0], inputs=arrays)
    write_bundle(tmp_path / "b", replace(made, artifact=artifact, golden=(vector,)))
    (loaded,) = open_bundle(tmp_path / "b").golden()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded.inputs[name], array)
        assert loaded.inputs[name].dtype == array.dtype.newbyteorder("=")


def test_a_tokenizer_travels_without_the_weights_beside_it(made: BundleContents, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (source / name).write_text("{}")
    for given in (source, source / "tokenizer.json"):
        model = replace(made.model, preprocessing=TextPreprocessing(str(given), text_keys=("a", "b")))
        write_bundle(tmp_path / "b", replace(made, model=model))
        loaded = open_bundle(tmp_path / "b")
        assert isinstance(loaded.preprocessing, TextPreprocessing)
        assert (Path(loaded.preprocessing.tokenizer) / "tokenizer.json").is_file()
        assert not list((tmp_path / "b").rglob("*.safetensors"))
        assert "Tokenize the pair (a, b)" in (tmp_path / "b" / "README.md").read_text()


def test_a_missing_tokenizer_is_named_and_leaves_nothing(made: BundleContents, tmp_path: Path) -> None:
    model = replace(made.model, preprocessing=TextPreprocessing(str(tmp_path / "none")))
    with pytest.raises(UsageError, match=r"tokenizer .*none: no tokenizer\.json there"):
        write_bundle(tmp_path / "dist" / "b", replace(made, model=model))
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("target", "emulation", "check_needs"),
    [
        ("ethosu55-int8", ".tflite", "ai-edge-litert"),
        ("ethosu55-executorch-int8", ".tosa", "tosa-tools"),
        ("android-vulkan-fp16", ".pte", "executorch"),
        ("qualcomm-int8", None, "onnxruntime==1.31.1"),
        ("openvino-int8", None, "onnxruntime==1.31.1"),
    ],
)
def test_readme_of_an_accelerator_names_no_cpu_runtime_for_the_device(
    made: BundleContents, tmp_path: Path, target: str, emulation: str | None, check_needs: str
) -> None:
    # Regression: a file that Vela compiled was to be run with LiteRT for Python, a Vulkan one with XNNPACK's AAR.
    loaded = load_target(target)
    path = None
    if emulation is not None:
        path = tmp_path / f"emulated{emulation}"
        path.write_bytes(b"the same arithmetic")
    artifact = replace(made.artifact, format=loaded.format, emulation=path)
    write_bundle(tmp_path / "b", replace(made, artifact=artifact, target=loaded))
    text = (tmp_path / "b" / "README.md").read_text()
    assert "## On the accelerator" in text
    assert f"pip install numpy {check_needs}\npython check.py" in text
    assert "The model was proven with" not in text
    assert "litert:litert" not in text


def test_an_artifact_that_changed_is_refused(made: BundleContents, tmp_path: Path) -> None:
    made.artifact.path.write_bytes(b"other")
    with pytest.raises(TamperedError, match="changed since it was exported"):
        write_bundle(tmp_path / "b", made)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("format_", "platform", "expected"),
    [
        ("litert", "android", "`android/build.gradle.kts` begins with"),
        ("onnx", "android", "(Gradle: `com.microsoft.onnxruntime:onnxruntime-android:1.31.1`; Python: `onnxruntime==1"),
        ("onnx", "linux-arm64", "pip install numpy onnxruntime==1.31.1\npython check.py\ndevice/check --help"),
        ("onnx", "linux-arm64", "The model was proven with ONNX Runtime 1.31.1 (Python: `onnxruntime==1.31.1`)"),
        ("executorch", "linux-arm64", "`cpp/CMakeLists.txt` begins with how to build"),
    ],
)
def test_readme_tells_how_to_use_it(
    made: BundleContents, tmp_path: Path, format_: Format, platform: str, expected: str
) -> None:
    quantized = SignatureTensor(
        "image", "args_0", (1, "batch", 4), "int8", "float32", (0, 2, 1), QuantParams((0.25,), (-3,))
    )
    signature = replace(made.artifact.signature, inputs=(quantized,))
    artifact = replace(made.artifact, format=format_, signature=signature)
    target = replace(made.target, platform=platform)
    report = replace(made.report, status="failed")
    write_bundle(tmp_path / "b", replace(made, artifact=artifact, target=target, report=report))
    text = (tmp_path / "b" / "README.md").read_text()
    assert expected in text
    assert "| `args_0` | 1 x batch x 4 | int8 | scale 0.25, zero point -3 | transposed" in text
    assert "real = 0.25 * (stored - -3)" in text
    assert "missed at least one of its gates" in text
    assert "1. Decode to RGB" in text
    assert "central square of side 0.875" in text
    assert "`(value / 1.0 - mean) / std` with mean = [127.0] and std = [128.0]" in text
    assert "\n\n\n" not in text


def test_readme_on_sound(made: BundleContents, tmp_path: Path) -> None:
    model = replace(made.model, preprocessing=AudioPreprocessing(mean=0.5))
    write_bundle(tmp_path / "b", replace(made, model=model))
    assert "resample to 16000 Hz" in (tmp_path / "b" / "README.md").read_text()


# --- check.py --------------------------------------------------------------------------------------------------------


def run_check(bundle: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(bundle / "check.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_check_script_passes_on_what_was_shipped(made: BundleContents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", made)
    done = run_check(tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    assert "all outputs agree" in done.stdout
    open_bundle(tmp_path / "b")  # running it adds no file


def test_check_script_fails_on_other_outputs(made: BundleContents, tmp_path: Path) -> None:
    x = made.golden[0].inputs["image"]
    wrong = replace(made.golden[0], outputs={"scores": x * 3})
    nan = replace(made.golden[0], outputs={"scores": np.where(x > 0, np.nan, x)})
    write_bundle(tmp_path / "b", replace(made, golden=(made.golden[0], wrong, nan)))
    done = run_check(tmp_path / "b")
    assert done.returncode == 1
    assert "2 outputs do not agree" in done.stdout


def test_check_script_fails_on_a_damaged_file(made: BundleContents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", made)
    (tmp_path / "b" / "model.onnx").write_bytes(b"")
    done = run_check(tmp_path / "b")
    assert done.returncode == 1
    assert "damaged or missing: model.onnx" in done.stdout


# --- tampering -------------------------------------------------------------------------------------------------------


def edit_manifest(bundle: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest as a careful forger would: report.json's binding and hash are renewed."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (bundle / "manifest.json").write_text(text)
    report = json.loads((bundle / "report.json").read_text())
    report["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    report["sha256"] = seal(report)
    (bundle / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(golden=[]), "has no golden vectors"),
        (lambda m: m["golden"][0].update(inputs={}), "has inputs in golden vector 0 that are not those"),
        (lambda m: m["golden"][0].update(reference={}), "has a reference in golden vector 0"),
        (lambda m: m["target_definition"].update(runtimes=[]), "names no runtime"),
        (lambda m: m.update(format="litert"), "is for 'android-onnx-int8' \\(litert\\), its target_definition for"),
        (lambda m: m.update(golden_tolerance=2), "has the golden_tolerance 2"),
        (lambda m: m["float_twin"]["signature"].update(outputs=[]), "no outputs"),
        (lambda m: m["model"]["signature"]["inputs"][0].update(permutation=[5, 6]), "transposes the tensor 'image'"),
        (
            lambda m: m["model"]["signature"]["outputs"][0].update(quantization={"scale": [], "zero_point": []}),
            "quantizes the tensor 'scores'",
        ),
        (lambda m: m.update(status="failed"), "report.json: says 'passed', and manifest.json 'failed'"),
    ],
)
def test_a_forged_manifest_that_contradicts_itself(
    made: BundleContents, tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    write_bundle(tmp_path / "b", made)
    edit_manifest(tmp_path / "b", change)
    with pytest.raises(TamperedError, match=message):
        open_bundle(tmp_path / "b")


def test_a_changed_report_is_noticed(made: BundleContents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", made)
    report = tmp_path / "b" / "report.json"
    report.write_text(report.read_text().replace('"status": "passed"', '"status": "failed"'))
    with pytest.raises(TamperedError, match=r"report.json: was changed"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(("dtype", "stored"), [("float64", "float32"), ("uint16", "int64")])
def test_labels_of_any_numeric_type_are_kept(made: BundleContents, tmp_path: Path, dtype: str, stored: str) -> None:
    vector = replace(made.golden[0], label=np.array([1, 2], dtype))
    write_bundle(tmp_path / "b", replace(made, golden=(vector,)))
    label = next(open_bundle(tmp_path / "b").golden()).label
    assert isinstance(label, np.ndarray)
    assert (label.dtype, label.tolist()) == (stored, [1, 2])


def rename_model(manifest: dict, name: str) -> None:
    manifest["files"][name] = manifest["files"].pop("model.onnx")
    manifest["model"]["file"] = name


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda b: (b / "model.onnx").write_bytes(b"x"), r"model\.onnx: is not the file"),
    "golden": (lambda b: (b / "golden/0/output_scores.bin").write_bytes(b"\0" * 16), r"output_scores\.bin: is not"),
    "missing": (lambda b: (b / "labels.txt").unlink(), r"labels\.txt: is missing"),
    "no report": (lambda b: (b / "report.json").unlink(), r"report\.json: is missing"),
    "added": (lambda b: (b / "golden/extra").write_text(""), r"golden/extra: is not in the manifest"),
    "manifest": (lambda b: (b / "manifest.json").write_text((b / "manifest.json").read_text() + " "), r"report\.json"),
    "linked file": (
        lambda b: ((b / "labels.txt").unlink(), (b / "labels.txt").symlink_to("/etc/passwd")),
        r"labels\.txt: is a link",
    ),
    "linked folder": (lambda b: (b / "more").symlink_to("/etc"), r"more: is a link"),
    "fifo": (lambda b: os.mkfifo(b / "pipe"), r"pipe: is no regular file"),
    "traversal": (lambda b: edit_manifest(b, lambda m: rename_model(m, "../made.onnx")), r"leads out"),
    "absolute": (lambda b: edit_manifest(b, lambda m: rename_model(m, "/etc/passwd")), r"leads out"),
    "unlisted": (lambda b: edit_manifest(b, lambda m: m["model"].update(file="/etc/passwd")), r"does not list"),
    "tokenizer": (
        lambda b: edit_manifest(b, lambda m: m.update(preprocessing={"kind": "text", "tokenizer": "/etc"})),
        r"/etc/tokenizer\.json', which `files` does not list",
    ),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_tampering_is_named(made: BundleContents, tmp_path: Path, case: str) -> None:
    tamper, problem = TAMPERINGS[case]
    write_bundle(tmp_path / "b", made)
    tamper(tmp_path / "b")
    with pytest.raises(TamperedError, match=problem):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("shape", [[1, 5], [-1, -4], [4], [2**40, 2**40]])
def test_a_golden_shape_that_does_not_fit_its_file(made: BundleContents, tmp_path: Path, shape: list[int]) -> None:
    write_bundle(tmp_path / "b", made)
    edit_manifest(tmp_path / "b", lambda m: m["golden"][0]["inputs"]["image"].update(shape=shape))
    loaded = open_bundle(tmp_path / "b")
    if shape == [4]:
        assert next(loaded.golden()).inputs["image"].shape == (4,)
    else:
        with pytest.raises(TamperedError, match=r"input_image\.bin"):
            next(loaded.golden())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "not the manifest of an edgeopt bundle"),
        ('{"kind": "edgeopt-bundle", "schema_version": 2}', "schema version 2, this edgeopt reads 1"),
        ('{"kind": "edgeopt-bundle", "schema_version": 1}', "manifest.json: "),
    ],
)
def test_a_malformed_manifest_is_one_line(made: BundleContents, tmp_path: Path, text: str, problem: str) -> None:
    write_bundle(tmp_path / "b", made)
    (tmp_path / "b" / "manifest.json").write_text(text)
    with pytest.raises(UsageError, match=problem):
        open_bundle(tmp_path / "b")


def test_what_is_no_bundle_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a bundle directory"):
        open_bundle(tmp_path / "none")
    with pytest.raises(UsageError, match=r"it has no manifest\.json"):
        open_bundle(tmp_path)


def test_what_stands_in_for_the_model_and_what_the_device_needs_travel_too(
    made: BundleContents, tmp_path: Path
) -> None:
    stand_in, context = tmp_path / "work" / "before.onnx", tmp_path / "work" / "context.bin"
    stand_in.write_bytes(made.artifact.path.read_bytes())
    context.write_bytes(b"compiled")
    changed = replace(made, artifact=replace(made.artifact, emulation=stand_in), device_files=(context,))
    write_bundle(tmp_path / "b", changed)
    loaded = open_bundle(tmp_path / "b")
    assert loaded.manifest.model.emulation == "emulation/model.onnx"
    assert loaded.runnable_path == tmp_path / "b" / "emulation" / "model.onnx"
    assert loaded.manifest.device_files == ("compiled/context.bin",)
    guide = (tmp_path / "b" / "README.md").read_text()
    assert "`emulation/model.onnx` | the same arithmetic for a computer" in guide
    assert "`compiled/context.bin`" in guide
    (tmp_path / "b" / "compiled" / "context.bin").write_bytes(b"another")
    with pytest.raises(TamperedError, match=r"context\.bin"):
        open_bundle(tmp_path / "b")


def test_a_model_may_be_a_directory(made: BundleContents, tmp_path: Path) -> None:
    package = tmp_path / "work" / "made.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")
    (package / "Data" / "weights.bin").write_bytes(b"w" * 64)
    artifact = replace(made.artifact, path=package, format="coreml", size_bytes=66, sha256=sha256_of(package))
    target = replace(made.target, format="coreml", runtimes=("coreml-reference",))
    write_bundle(tmp_path / "b", replace(made, artifact=artifact, float_artifact=None, target=target))
    loaded = open_bundle(tmp_path / "b")
    assert loaded.model_path == tmp_path / "b" / "model.mlpackage"
    assert sha256_of(loaded.model_path) == artifact.sha256
    assert loaded.manifest.files["model.mlpackage/Data/weights.bin"].size_bytes == 64
    (package / "Data" / "weights.bin").write_bytes(b"v" * 64)
    with pytest.raises(TamperedError, match="has changed since it was exported"):
        write_bundle(tmp_path / "c", replace(made, artifact=artifact, float_artifact=None, target=target))


def test_a_bundle_of_parts_says_what_runs_it(made: BundleContents, tmp_path: Path) -> None:
    """Regression: a file that the accelerator takes in parts had no README."""
    parts = tmp_path / "work" / "model.tosa.zip"
    parts.write_bytes(b"PK")
    write_bundle(tmp_path / "b", replace(made, artifact=replace(made.artifact, emulation=parts)))
    done = subprocess.run([sys.executable, "check.py"], cwd=tmp_path / "b", capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "edgeopt validate" in done.stdout


def test_the_readme_speaks_of_folders_that_are_there(made: BundleContents, tmp_path: Path) -> None:
    """Regression: in a bundle for iOS, `ios/` was "the same" as an android/ that wasn't there."""
    for target in ("android-onnx-int8", "linux-arm64-onnx-int8", "openvino-int8"):
        path = write_bundle(tmp_path / target, replace(made, target=load_target(target))).path
        text = (path / "README.md").read_text()
        for folder in ("android", "ios", "cpp", "python", "device"):
            assert (f"| `{folder}/` |" in text) is (path / folder).is_dir(), (target, folder)
        assert "the same as" not in text
