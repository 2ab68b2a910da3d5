"""`edgeopt coverage`: one model against many targets; what falls back to the CPU, and which rewrites would help."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING

from edgeopt.compression.rewrites.apply import apply_rewrites, suggest
from edgeopt.compression.rewrites.base import Applied, Suggestion
from edgeopt.coverage_placing import cover, cover_file, default_targets, exported_file, targets_for
from edgeopt.coverage_rows import fallbacks, layer_kinds, rows_by_kind, rows_by_layer, source_layer
from edgeopt.coverage_values import CoverageReport, Outcome, TargetCoverage
from edgeopt.errors import ConversionError, MissingError, UsageError
from edgeopt.plan import ExampleInput, load, with_example, with_preprocessing
from edgeopt.progress import Progress
from edgeopt.types import Artifact, LayerRules, Model, NpuKind, OpPlacement, Placement
from edgeopt.workbench import Workbench

if TYPE_CHECKING:
    from edgeopt.config import RunConfig
    from edgeopt.datasets.base import Dataset

_ENOUGH = "enough to see where operators run, not for numerics"
#: Each target's file is calibrated on its own.
_SAMPLES = 16


def coverage(config: RunConfig, progress: Progress, *, rewrite: bool = False) -> CoverageReport:
    """Convert the model for every target and tell where its operators run. An exported file is only read.

    Args:
        rewrite: apply the rewrites that may help, each proven on the float model, and look again.

    Raises:
        UsageError: an unknown target or device, or no target takes the file.
        ConversionError, MissingError: not one target gave a result; the first one's reason.
    """
    config = with_example(config)
    path = Path(config.model).expanduser() if isinstance(config.model, str) else None
    artifact = exported_file(path) if path is not None else None
    with TemporaryDirectory(prefix="edgeopt-") as folder:
        if artifact is not None:
            if rewrite:
                raise UsageError("can't be rewritten: it is exported already", where=str(path), fix="give the model")
            report = _of_file(artifact, config, Path(folder), progress)
        else:
            report = _of_model(config, Path(folder), progress, rewrite)
    _check_any(report)
    return report


def _of_file(artifact: Artifact, config: RunConfig, folder: Path, progress: Progress) -> CoverageReport:
    names = config.target or targets_for(artifact.format)
    if not names:
        raise UsageError(f"no built-in target has an accelerator for {artifact.format} files", where=str(artifact.path))
    tracked = progress.track(names, "Asking targets", len(names))
    targets = [cover_file(name, config.device, artifact, _new(folder)) for name in tracked]
    return _report(artifact.path.name, "An exported file, read as it is", targets, {})


def _of_model(config: RunConfig, folder: Path, progress: Progress, rewrite: bool) -> CoverageReport:
    names = tuple(dict.fromkeys(config.target or default_targets()))
    progress.step("Loading the model")
    model = with_preprocessing(config, load(config))
    samples, origin = _calibration(config, model)
    rules = LayerRules(config.keep_float, config.int16_activations)
    bench = Workbench(model, samples, rules, config.seed, _new(folder), progress)
    before = _covered(names, config, bench, folder, progress)
    torch_model = bench.torch_model() if model.module is not None or _is_needed(before) else None
    kinds = layer_kinds(torch_model.module) if torch_model is not None else {}
    report = _report(model.name, origin, before, kinds)
    if torch_model is None:
        return report
    suggestions = _worth_trying(torch_model, before, kinds)
    report = replace(report, suggestions=suggestions)
    if not rewrite or not suggestions:
        return report
    progress.step("Rewriting")
    wanted = [suggestion.name for suggestion in suggestions]
    data = samples if config.calibration is not None else ()
    rewritten, applied = apply_rewrites(torch_model, wanted, _kinds(before), data, config.seed)
    if rewritten is torch_model:
        return replace(report, outcomes=tuple(Outcome(one, ()) for one in applied))
    after = _covered(names, config, bench.variant(rewritten), folder, progress)
    outcomes = tuple(Outcome(one, _helped(one, before, after, kinds)) for one in applied)
    return replace(report, outcomes=outcomes, after=_report(model.name, origin, after, kinds))


def _calibration(config: RunConfig, model: Model) -> tuple[Dataset, str]:
    from edgeopt.datasets import match_labels, open_dataset, select

    if config.calibration is None:
        return ExampleInput(model), f"Calibrated with the model's example input: {_ENOUGH}"
    source = match_labels(open_dataset(config.calibration, model.inputs, model.preprocessing), model.labels)
    chosen = select(source, min(config.num_calibration_samples, _SAMPLES), config.seed)
    return chosen, f"Calibrated with {len(chosen)} samples of the calibration data: {_ENOUGH}"


def _covered(
    names: Sequence[str], config: RunConfig, bench: Workbench, folder: Path, progress: Progress
) -> tuple[TargetCoverage, ...]:
    found = []
    for number, name in enumerate(names, 1):
        progress.step(f"{name} ({number} of {len(names)})")
        found.append(cover(name, config, bench, _new(folder)))
    return tuple(found)


def _report(model: str, calibration: str, targets: Sequence[TargetCoverage], kinds: dict[str, str]) -> CoverageReport:
    return CoverageReport(
        model=model,
        calibration=calibration,
        targets=tuple(targets),
        rows=rows_by_kind(targets, kinds),
        layers=rows_by_layer(targets, kinds),
        fallbacks=fallbacks(targets),
    )


def _is_needed(targets: Iterable[TargetCoverage]) -> bool:
    """Whether anything could be better, so that rebuilding a graph file in torch is worth it."""
    return any(target.on_cpu != 0 for target in targets)


def _kinds(targets: Iterable[TargetCoverage]) -> tuple[NpuKind, ...]:
    """Accelerators whose files have operators on the CPU, or that took none."""
    return tuple(dict.fromkeys(t.accelerator for t in targets if t.accelerator is not None and _is_imperfect(t)))


def _is_imperfect(target: TargetCoverage) -> bool:
    return bool(target.on_cpu) or (target.problem or "").startswith("can't convert")


def _worth_trying(model: Model, targets: Sequence[TargetCoverage], kinds: dict[str, str]) -> tuple[Suggestion, ...]:
    """Rewrites of layers that fall back on an accelerator that the rewrite may help, or of any layer where a target
    took no file or its file does not tell its layers."""
    try:
        found = suggest(model, _kinds(targets))
    except ConversionError:
        return ()  # torch.export can't follow the model; the targets' own problems say so
    return tuple(one for one in found if any(_concerns(one, target, kinds) for target in targets))


def _concerns(suggestion: Suggestion, target: TargetCoverage, kinds: dict[str, str]) -> bool:
    if target.accelerator not in suggestion.helps or not _is_imperfect(target):
        return False
    if target.placement is None:
        return True
    if _tells_no_layers(target.placement):
        return bool(target.on_cpu)
    return any(_place(op, kinds) in suggestion.layers for op in target.placement.on_cpu)


def _helped(
    applied: Applied, before: Iterable[TargetCoverage], after: Iterable[TargetCoverage], kinds: dict[str, str]
) -> tuple[str, ...]:
    if applied.refused is not None:
        return ()
    layers = frozenset(applied.suggestion.layers)

    def helps(old: TargetCoverage, new: TargetCoverage) -> bool:
        if new.placement is None:
            return False
        left = _fallen(new, layers, kinds)
        return left == 0 if old.placement is None else left < _fallen(old, layers, kinds)

    return tuple(new.target for old, new in zip(before, after, strict=True) if helps(old, new))


def _fallen(target: TargetCoverage, layers: frozenset[str], kinds: dict[str, str]) -> int:
    """How many operators of these layers fall back; of all, where the file does not tell its layers."""
    assert target.placement is not None
    on_cpu = target.placement.on_cpu
    return len(on_cpu) if _tells_no_layers(target.placement) else sum(_place(op, kinds) in layers for op in on_cpu)


def _tells_no_layers(placement: Placement) -> bool:
    return all(op.layer is None for op in placement.ops)


def _place(op: OpPlacement, kinds: dict[str, str]) -> str:
    """The layer of an operator, as suggestions name it: "" for what lies between layers."""
    return source_layer(op, kinds) or op.layer or ""


def _check_any(report: CoverageReport) -> None:
    """Raise where no target gave a result, before or after."""
    after = report.after.targets if report.after is not None else ()
    if any(target.placement is not None for target in (*report.targets, *after)):
        return
    first = report.targets[0]
    kind = MissingError if all((t.problem or "").startswith("needs") for t in report.targets) else ConversionError
    fix = None
    if report.suggestions:
        fix = f"--apply-rewrites may help: {', '.join(one.name for one in report.suggestions)}"
    raise kind(f"no target gave a result; {first.problem}", where=f"target {first.target!r}", fix=fix)


def _new(folder: Path) -> Path:
    return Path(mkdtemp(dir=folder))
