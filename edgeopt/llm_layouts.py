"""Language models in the layouts of the runtimes' own generators: exported, proven on the file, and put in a folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING

from edgeopt.bundle.destination import prepare_output, replace_directory
from edgeopt.bundle.llm_manifest import write_llm_manifest
from edgeopt.datasets import open_dataset, select
from edgeopt.errors import ConversionError, UsageError
from edgeopt.exporter import load_exporter
from edgeopt.generation.llm_executorch import executorch_model
from edgeopt.generation.llm_executorch_folder import write_executorch_llm
from edgeopt.generation.llm_genai import genai_model
from edgeopt.generation.llm_genai_folder import write_genai
from edgeopt.generation.llm_litert import convert_litert_lm, quantize_litert_lm, refuse_litert_lm
from edgeopt.generation.llm_litert_file import require_builder, write_litert_lm
from edgeopt.generation.llm_network import language_model
from edgeopt.generation.llm_steps import LiteRtSteps, executorch_logits, genai_logits, prompt_length
from edgeopt.generation.llm_tokenizer import tokenizer_file
from edgeopt.plan import ExampleInput, load
from edgeopt.progress import Progress, Silent
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.reference import open_reference
from edgeopt.targets import load_target
from edgeopt.types import Array, Format, Generation, LayerRules, Model
from edgeopt.validation.fidelity import Fidelity
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset
    from edgeopt.targets.schema import Target

#: Format -> the generator that the folder is for.
GENERATORS: dict[Format, str] = {
    "onnx": "onnxruntime-genai",
    "executorch": "ExecuTorch's text runner",
    "litert": "LiteRT-LM",
}
#: A proof runs so many texts, and so many tokens of each: it tells a wrong file from a right one, not good from better.
_TEXTS, _TOKENS = 8, 32

_Logits = Callable[[Array, int], Array]


@dataclass(frozen=True, slots=True)
class LayoutFile:
    """A file of a layout; `float_bytes` is what it would have with the network in float32."""

    name: str
    size_bytes: int
    float_bytes: int


@dataclass(frozen=True, slots=True)
class LayoutProof:
    """The shipped network's logits beside those of the source network in PyTorch, on this machine.

    Attributes:
        agreement: share of positions with the same most likely next token.
        sqnr_db: of all logits; None where the source's are zero.
        texts, tokens: how many were run, and at how many positions logits were compared.
        ran_in: the runtime that ran the file's network; not the generator, which would choose tokens from them.
    """

    agreement: float | None
    sqnr_db: float | None
    texts: int
    tokens: int
    origin: str
    ran_in: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A folder that a generator loads. `has_tokenizer`: else the app must bring its own."""

    path: Path
    target: str
    generator: str
    precision: str
    files: tuple[LayoutFile, ...]
    proof: LayoutProof
    has_tokenizer: bool


@dataclass(frozen=True, slots=True)
class _Network:
    """The network's file in float32 and as shipped, its runtime's name, and what fills a folder with it."""

    float_bytes: int
    size_bytes: int
    runtime: str
    write: Callable[[Path], object]
    open: Callable[[Path, ExitStack], _Logits]


def write_layouts(config: RunConfig, progress: Progress | None = None) -> tuple[Layout, ...]:
    """Write one folder per target, `<output-dir>/<model>-<target>-llm`.

    Raises:
        UsageError: no target, or one without such a layout or with calibrated activations; the model writes nothing
            or is an encoder-decoder; something else is where a folder goes.
        MissingError: a runtime or a builder is not installed.
        ConversionError: the network has no such layout, or the format can't hold it.
    """
    progress = progress or Silent()
    if config.step:
        raise UsageError(
            "steps are not done here",
            where="edgeopt llm",
            fix="do them with 'edgeopt export --save-weights FILE', and give file.py:factory with --weights FILE here",
        )
    targets = _targets(config)
    progress.step("Loading the model")
    model = load(config)
    _check_writes(model)
    for target in targets:
        prepare_output(_path(config, model, target))
    texts, origin = _texts(config, model)
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        run = _Run(config, model, texts, origin, Path(folder), progress)
        return tuple(run.build(target) for target in targets)


@dataclass(frozen=True, slots=True)
class _Run:
    """What the targets of one run share; the float files too."""

    config: RunConfig
    model: Model
    texts: Dataset
    origin: str
    folder: Path
    progress: Progress
    benches: dict[Format, Workbench] = field(default_factory=dict)
    floats: list[Path] = field(default_factory=list)

    def build(self, target: Target) -> Layout:
        """Export, write beside, prove what was written, and put it in place."""
        network = self._litert(target) if target.format == "litert" else self._ordinary(target)
        final = _path(self.config, self.model, target)
        with replace_directory(final) as folder:
            network.write(folder)
            proof = self._prove(network, folder)
            saved = network.float_bytes - network.size_bytes
            made = sorted(folder.iterdir())
            files = tuple(_file(path, saved if path.name in _NETWORK_FILES else 0) for path in made)
            layout = Layout(
                path=final,
                target=target.name,
                generator=GENERATORS[target.format],
                precision=target.scheme.precision,
                files=files,
                proof=proof,
                has_tokenizer=tokenizer_file(self.model) is not None,
            )
            told = {one.name: getattr(layout, one.name) for one in fields(layout) if one.name not in ("path", "files")}
            write_llm_manifest(folder, self.model, told)
        return layout

    def _ordinary(self, target: Target) -> _Network:
        """A layout whose network is a model like any other."""
        is_onnx = target.format == "onnx"
        if target.format not in self.benches:
            form = genai_model(self.model) if is_onnx else executorch_model(self.model)
            rules = LayerRules(self.config.keep_float, self.config.int16_activations)
            directory = Path(mkdtemp(dir=self.folder))
            self.benches[target.format] = Workbench(form, None, rules, self.config.seed, directory, self.progress)
        bench = self.benches[target.format]
        twin = artifact = bench.float_artifact(target.format)
        if not target.scheme.is_plain_float:
            artifact, _ = bench.quantized_artifact(target.format, target.scheme, target.estimator)
        runtime = load_runtime(target.runtimes[0])
        logits = genai_logits if is_onnx else executorch_logits
        write = write_genai if is_onnx else write_executorch_llm

        def opened(folder: Path, stack: ExitStack) -> _Logits:
            path = folder / ("model.onnx" if is_onnx else "model.pte")
            session = stack.enter_context(runtime.open(path, artifact.signature, self.config.threads))
            return lambda ids, prompt: logits(session, ids, prompt)

        return _Network(
            float_bytes=twin.size_bytes,
            size_bytes=artifact.size_bytes,
            runtime=runtime.name,
            write=lambda folder: write(self.model, artifact, folder),
            open=opened,
        )

    def _litert(self, target: Target) -> _Network:
        if not self.floats:
            self.progress.step("Exporting fp32 (LiteRT-LM)")
            self.floats.append(self.folder / "litert-lm-fp32.tflite")
            convert_litert_lm(self.model, self.floats[0])
        twin = network = self.floats[0]
        if not target.scheme.is_plain_float:
            self.progress.step(f"Converting to {target.scheme.precision} (LiteRT-LM)")
            network = Path(mkdtemp(dir=self.folder)) / "network.tflite"
            quantize_litert_lm(twin, target.scheme, network)
        return _Network(
            float_bytes=twin.stat().st_size,
            size_bytes=network.stat().st_size,
            runtime="litert",
            write=lambda folder: write_litert_lm(self.model, network, folder),
            # The .litertlm file holds this very one.
            open=lambda _folder, _stack: LiteRtSteps(network, _generation(self.model)).logits,
        )

    def _prove(self, network: _Network, folder: Path) -> LayoutProof:
        generation, tokens = _generation(self.model), 0
        reference = open_reference(self.model, self.config.threads)
        if reference is None:
            raise ConversionError("can't be run here", where=self.model.name)
        fidelity = Fidelity()
        with ExitStack() as stack:
            source, logits = stack.enter_context(reference()), network.open(folder, stack)
            for sample in self.progress.track(self.texts, "Proving", len(self.texts)):
                ids = sample.inputs["input_ids"][:, : min(_TOKENS, generation.max_target)]
                prompt = prompt_length(ids.shape[1], generation)
                expected = source.run({"input_ids": ids})["logits"][:, prompt - 1 :]
                fidelity.update({"logits": expected}, {"logits": logits(ids, prompt)})
                tokens += expected.shape[1]
        (result,) = fidelity.results()
        return LayoutProof(result.agreement, result.sqnr_db, len(self.texts), tokens, self.origin, network.runtime)


#: The file of a folder that the network is in.
_NETWORK_FILES = frozenset({"model.onnx", "model.pte", "model.litertlm"})


def _file(path: Path, saved: int) -> LayoutFile:
    size = path.stat().st_size
    return LayoutFile(path.name, size, size + saved)


def _path(config: RunConfig, model: Model, target: Target) -> Path:
    return config.output_dir / f"{model.name}-{target.name}-llm"


def _generation(model: Model) -> Generation:
    return language_model(model).generation


def _targets(config: RunConfig) -> tuple[Target, ...]:
    """The targets, refused where one can't be made or run here; before any work."""
    if not config.target:
        raise UsageError(
            "no target given", where="edgeopt llm", fix="--target android-onnx-w4, or another of 'edgeopt targets'"
        )
    targets = tuple(load_target(name) for name in dict.fromkeys(config.target))
    names = [target.name for target in targets]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"two targets are called {doubled!r}", fix="rename one of the files")
    return tuple(map(_checked, targets, [LayerRules(config.keep_float, config.int16_activations)] * len(targets)))


def _checked(target: Target, rules: LayerRules) -> Target:
    where = f"target {target.name!r}"
    if target.accelerator is not None or target.format not in GENERATORS:
        raise UsageError(
            "no generator of language models is known for it",
            where=where,
            fix="take a CPU target: android-onnx-*, android-executorch-*, or LiteRT's android-*",
        )
    if target.scheme.needs_calibration:
        instead = {"onnx": "android-onnx-w4", "executorch": "android-executorch-int8-dynamic"}
        raise UsageError(
            "quantizes activations statically, which these layouts don't do",
            where=where,
            fix=f"take dynamic or weight-only: {instead.get(target.format, 'android-int8-dynamic')}",
        )
    if target.format == "litert":
        refuse_litert_lm(target.scheme)
        if rules.keep_float:
            raise ConversionError("keeps no single layers float for LiteRT-LM", where=where, fix="drop --keep-float")
        require_builder()
    elif (problem := load_exporter(target.format, None).unsupported(target.scheme, rules)) is not None:
        raise ConversionError(problem, where=where)
    return target


def _check_writes(model: Model) -> None:
    if model.generation is None:
        raise UsageError("does not write", where=model.name, fix="export it with 'edgeopt export'")
    if model.generation.kind != "decoder":
        raise UsageError(
            "is an encoder-decoder, and the runtimes' generators run decoder-only networks",
            where=model.name,
            fix="'edgeopt export' makes its encoder and its decoder, and proves them",
        )
    language_model(model)


def _texts(config: RunConfig, model: Model) -> tuple[Dataset, str]:
    if config.evaluation is None:
        return ExampleInput(model), "example input"
    data = open_dataset(config.evaluation, model.inputs, model.preprocessing)
    return select(data, min(_TEXTS, config.num_evaluation_samples or _TEXTS), config.seed), "evaluation set"
