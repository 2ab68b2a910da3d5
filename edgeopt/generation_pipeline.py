"""The straight line for networks that write: their parts are exported one by one, and proven together."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from edgeopt.bundle import BundleContents
from edgeopt.bundle.generation import write_generation_bundle
from edgeopt.bundle.generation_contents import GenerationContents, GoldenSequence, WrittenExample
from edgeopt.datasets import match_labels, open_dataset, select
from edgeopt.errors import UsageError
from edgeopt.generation.parts import split
from edgeopt.generation.samples import part_dataset
from edgeopt.generation.tokens import Tokens
from edgeopt.generation.writer import Writer
from edgeopt.golden_vectors import golden_sequences, golden_vectors
from edgeopt.plan import Data, Job, bundle_path
from edgeopt.runtimes import load_runtime
from edgeopt.runtimes.reference import open_reference
from edgeopt.sources.huggingface_files import directory_of
from edgeopt.sources.huggingface_tokenizer import tokenizer_of
from edgeopt.sources.structure_file import save_weights
from edgeopt.tuning.context import StepData
from edgeopt.tuning.recipe import apply_passes
from edgeopt.tuning.sparse_file import with_sparse_kernels
from edgeopt.tuning.steps import Made, run_steps
from edgeopt.types import (
    Artifact,
    Bundle,
    Finding,
    Format,
    Gates,
    Generation,
    LayerRules,
    Model,
    PartName,
    TextPreprocessing,
)
from edgeopt.validation.generation import GenerationTerms, prove_generation
from edgeopt.validation.phones import Phones
from edgeopt.validation.prove import Subject, Terms, prove
from edgeopt.validation.text_metrics import DEFAULTS, PERPLEXITY, load_text_metric
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets import DataSource
    from edgeopt.datasets.base import Dataset
    from edgeopt.progress import Progress

#: On which every part is compared with its own float twin; the whole is judged on all evaluation samples.
PART_SAMPLES = 16


@dataclass(frozen=True, slots=True)
class _Part:
    """One file of the network.

    Attributes:
        model: what was exported; `artifact` ships, `twin` is its own fp32 file.
        findings: of its calibration. samples: for its proof and its golden vectors.
    """

    model: Model
    artifact: Artifact
    twin: Artifact
    findings: tuple[Finding, ...]
    samples: Dataset


@dataclass(frozen=True, slots=True)
class WriterRun:
    """What the targets of one run share.

    Attributes:
        workbench: of the whole network as it was loaded; what it exports is never shipped, but steps and passes work
            on it.
        tokenizer: the tokenizer.json of what it reads or writes; None without one.
        metric: what judges the texts; None where there is nothing to compare them with.
        originals: format -> fp32 files of the network's parts as it was loaded, which everything is compared with.
    """

    config: RunConfig
    model: Model
    data: Data
    findings: tuple[Finding, ...]
    tokenizer: Path | None
    metric: str | None
    workbench: Workbench
    folder: Path
    progress: Progress
    originals: dict[Format, Mapping[PartName, Artifact]] = field(default_factory=dict)

    def build(self, job: Job) -> Bundle:
        """Make the network smaller where that is wanted, export its parts, prove them and the whole, and pack."""
        made, remarks = self._steps(job)
        model = made[-1].model if made else self.model
        bench = self.workbench.variant(model) if made else self.workbench
        model = apply_passes(bench, job.recipe, job.scheme, job.estimator, self.progress).model
        parts = self._parts(model, job)
        shipped = {name: part.artifact for name, part in parts.items()}
        if model is self.model:
            self.originals.setdefault(job.target.format, {name: part.twin for name, part in parts.items()})
        twins = self._originals(job.target.format)
        found = tuple(finding for part in parts.values() for finding in part.findings)
        terms = self._terms(job)
        is_original = model is self.model and job.scheme.is_plain_float
        proof = prove_generation(
            shipped, None if is_original else twins, terms, (*self.findings, *remarks, *found), self.progress
        )
        contents = GenerationContents(
            target=replace(job.target, gates=job.gates, scheme=job.scheme, estimator=job.estimator),
            device=job.device,
            model=self.model,
            generation=self._generation,
            parts={name: self._contents(part, job) for name, part in parts.items()},
            report=proof.report,
            golden=self._golden(shipped, terms),
            examples=tuple(WrittenExample(e.source, e.reference, e.float_text, e.text) for e in proof.examples),
            beams=terms.beams,
            length_penalty=terms.length_penalty,
            metric=terms.metric,
            metric_signature=_text(proof.report.evaluation.get("metric_signature")),
            licence=self.config.licence,
            tokenizer=self.tokenizer,
        )
        self.progress.step("Writing the bundle")
        bundle = write_generation_bundle(bundle_path(self.config, self.model, job), contents)
        if self.config.save_weights is not None:  # last: what it can't write must not cost the bundle
            save_weights(model, made[-1].base, self.config.save_weights)
        return bundle

    @property
    def _generation(self) -> Generation:
        if self.model.generation is None:
            raise ValueError("the model does not write")
        return self.model.generation

    def _terms(self, job: Job) -> GenerationTerms:
        return GenerationTerms(
            model=self.model.name,
            target=job.target.name,
            runtime=job.target.runtimes[0],
            generation=self._generation,
            tokenizer=self.tokenizer,
            samples=lambda: iter(self.data.evaluation),
            count=len(self.data.evaluation),
            origin=self.data.origin,
            metric=self.metric,
            gates=replace(job.gates, min_sqnr_db=None),
            required_gates=self.config.gates_set,
            advice=job.target.advice,
            threads=self.config.threads,
            beams=self.config.num_beams,
        )

    def _golden(self, shipped: Mapping[PartName, Artifact], terms: GenerationTerms) -> tuple[GoldenSequence, ...]:
        """A handful of sources with the tokens that the shipped files write."""
        tokens = self._tokens()
        runtime = load_runtime(terms.runtime)
        with ExitStack() as stack:
            sessions = {
                name: stack.enter_context(runtime.open(file.runnable, file.signature)) for name, file in shipped.items()
            }
            writer = Writer(sessions, terms.generation, terms.beams, length_penalty=terms.length_penalty)
            samples = self.data.evaluation
            return tuple(golden_sequences(writer, samples, terms.generation, tokens, terms.beams))

    def _tokens(self) -> Tokens | None:
        """They cut and begin a text as the data set did, and as an app will."""
        if self.tokenizer is None:
            return None
        read = self.model.preprocessing
        if isinstance(read, TextPreprocessing):
            return Tokens(self.tokenizer, self._generation, read.prefix, read.max_length)
        return Tokens(self.tokenizer, self._generation)

    def _steps(self, job: Job) -> tuple[tuple[Made, ...], tuple[Finding, ...]]:
        if not self.config.step:
            return (), ()
        data = StepData(self._open(self.config.train), self._open(self.config.validation), self.data.calibration)
        return run_steps(self.config.step, job, self.config, data, self.workbench, self.progress)

    def _parts(self, model: Model, job: Job) -> dict[PartName, _Part]:
        """The files to ship, each from a workbench of its own."""
        models = split(model, self.config.num_beams)
        return {name: self._part(model, models, name, job) for name in models}

    def _part(self, model: Model, models: Mapping[PartName, Model], name: PartName, job: Job) -> _Part:
        calibration = self.data.calibration
        seen = None if calibration is None else part_dataset(model, name, models, calibration, self.config.seed)
        chosen = select(self.data.evaluation, PART_SAMPLES, self.config.seed)
        samples = part_dataset(model, name, models, chosen, self.config.seed)
        rules = LayerRules(self.config.keep_float, self.config.int16_activations)
        self.progress.step(f"The {name}")
        bench = Workbench(models[name], seen, rules, self.config.seed, self._directory(name), self.progress)
        twin = artifact = bench.float_artifact(job.target.format)
        found: tuple[Finding, ...] = ()
        if not job.scheme.is_plain_float:
            artifact, found = bench.quantized_artifact(job.target.format, job.scheme, job.estimator)
        artifact, zeros = with_sparse_kernels(artifact, self._directory(f"{name}-sparse"))
        told = tuple(replace(finding, where=f"{name}: {finding.where}") for finding in (*found, *zeros))
        return _Part(models[name], artifact, twin, told, samples)

    def _originals(self, format_: Format) -> Mapping[PartName, Artifact]:
        """The fp32 files of the network as it was loaded; made once per format."""
        if format_ not in self.originals:
            made: dict[PartName, Artifact] = {}
            for name, part in split(self.model, self.config.num_beams).items():
                self.progress.step(f"The original's {name}")
                bench = Workbench(part, None, LayerRules(), self.config.seed, self._directory(name), self.progress)
                made[name] = bench.float_artifact(format_)
            self.originals[format_] = made
        return self.originals[format_]

    def _contents(self, part: _Part, job: Job) -> BundleContents:
        """One part, proven against its own float file, as an ordinary bundle. The limits judge the whole."""
        own_twin = None if part.artifact is part.twin else part.twin
        phones = Phones()
        if self.config.verify_on:
            count = min(self.config.num_verification_samples, len(part.samples))
            phones = Phones(self.config.verify_on, lambda: iter(select(part.samples, count, self.config.seed)), count)
        terms = Terms(
            model=part.model.name,
            target=job.target.name,
            runtimes=job.target.runtimes,
            samples=lambda: iter(part.samples),
            count=len(part.samples),
            origin=self.data.origin,
            metric=None,
            gates=Gates(),
            required_gates=frozenset(),
            advice=job.target.advice,
            threads=self.config.threads,
            phones=phones,
        )
        subject = Subject(part.artifact, own_twin, open_reference(part.model, self.config.threads))
        return BundleContents(
            target=replace(job.target, gates=Gates(), scheme=job.scheme, estimator=job.estimator),
            device=job.device,
            model=part.model,
            artifact=part.artifact,
            float_artifact=own_twin if self.config.float_twin else None,
            report=prove(subject, terms, part.findings, self.progress),
            golden=tuple(golden_vectors(part.artifact, part.twin, part.samples, job.target.runtimes[0])),
            licence=self.config.licence,
        )

    def _directory(self, name: str) -> Path:
        return Path(mkdtemp(prefix=f"{name}-", dir=self.folder))

    def _open(self, source: DataSource | None) -> Dataset | None:
        if source is None:
            return None
        dataset = open_dataset(source, self.model.inputs, self.model.preprocessing)
        return match_labels(dataset, self.model.labels)


def metric_for(config: RunConfig, generation: Generation, evaluation: Dataset, tokenizer: Path | None) -> str | None:
    """The user's metric, else the usual one of the task where the samples say what should be written; else none.

    Raises UsageError for an unknown one, one that the samples or the lack of a tokenizer rule out, and a limit on it
    where there is none; MissingError where its package is not installed.
    """
    first = evaluation[0]
    is_told = bool(first.references) or first.label is not None
    usual = DEFAULTS[generation.task] if tokenizer is not None else PERPLEXITY
    name = config.metric or (usual if is_told else None)
    if name is None:
        limits = {"max-accuracy-drop": config.max_accuracy_drop, "min-accuracy-kept": config.min_accuracy_kept}
        if limited := next((key for key, limit in limits.items() if limit is not None), None):
            raise UsageError(
                "can't be measured: the evaluation data don't say what should be written",
                where=limited,
                fix="give pairs of texts with --evaluation DATA",
            )
        return None
    if name != PERPLEXITY:
        load_text_metric(name)
        if tokenizer is None:
            raise UsageError(
                "judges texts, and the network has no tokenizer.json to make them with",
                where=f"metric {name!r}",
                fix=f"take --metric {PERPLEXITY}, or put the tokenizer beside the model",
            )
    if not is_told:
        raise UsageError(
            "compares with what should be written, which the evaluation data don't say",
            where=f"metric {name!r}",
            fix="give pairs of texts with --evaluation DATA",
        )
    return name


def tokenizer_for(config: RunConfig, model: Model) -> Path | None:
    """The tokenizer.json that the model's texts go through; for one that only writes text, that beside it."""
    if isinstance(model.preprocessing, TextPreprocessing):
        named = Path(model.preprocessing.tokenizer)
        return named / "tokenizer.json" if named.is_dir() else named
    source = config.model
    if isinstance(source, str) and source.startswith("hf:"):
        return tokenizer_of(directory_of(source.removeprefix("hf:")))
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def check_writer(config: RunConfig, jobs: tuple[Job, ...]) -> None:
    """Refuse what is not done for networks that write. Raises UsageError."""
    if config.min_sqnr_db is not None:
        raise UsageError(
            "limits the error of tensors, and networks that write are judged by their texts",
            where="min-sqnr-db",
            fix="set min-agreement or min-accuracy-kept; each part's report tells its own SQNR",
        )
    for job in jobs:
        where = f"target {job.target.name!r}"
        if job.target.accelerator is not None:
            raise UsageError(
                "is for an accelerator, and networks that write run on the CPU only",
                where=where,
                fix="take a CPU target, such as android-int8-dynamic; its parts can be exported one by one from Python",
            )
        if job.recipe == ("auto",):
            raise UsageError(
                "is not searched for networks that write",
                where="recipe",
                fix='name passes (recipe = ["smooth"]), or keep layers float with --keep-float',
            )
