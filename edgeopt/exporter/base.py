"""What every exporter does: one model in, a float file and a quantized file out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from edgeopt.calibration.ranges import Range
from edgeopt.errors import ConversionError
from edgeopt.formats.files import sha256_of, size_of
from edgeopt.formats.onnx import as_attribute, layer_names, load
from edgeopt.layer_names import check_patterns, strip_wrapper
from edgeopt.types import (
    Artifact,
    EstimatorSpec,
    Finding,
    Format,
    LayerRules,
    Model,
    Precision,
    Sample,
    Scheme,
    Signature,
    StepRecord,
    UnquantizedOp,
)

if TYPE_CHECKING:
    import torch

#: What zeros are worth where no kernel skips them.
ZEROS_SAVE_STORAGE = "zeros save storage only, in the bundle's packed file"


@dataclass(frozen=True, slots=True)
class CalibrationRun:
    """Calibration as an exporter sees it.

    Attributes:
        samples: a fresh, streaming iterator over the calibration samples at each call, always the same ones in the
            same order. Exporters must not keep samples.
        count: how many there are.
        estimator: which range estimator every activation gets.
        on_finding: told about activations that look unhealthy (see `edgeopt.calibration`).
        known: ranges that an earlier run over the same samples, with the same estimator, model and format, has found;
            the exporter reads what it needs and adds what it observes, so that the next conversion, with other layers
            exempt, runs no sample again. Keys are the exporter's own.
    """

    samples: Callable[[], Iterator[Sample]]
    count: int
    estimator: EstimatorSpec
    on_finding: Callable[[Finding], None]
    known: MutableMapping[str, Range] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizationRequest:
    """What to quantize to, which ranges, and which layers are exempt.

    Attributes:
        scheme: see `Scheme`.
        calibration: set exactly when `scheme.needs_calibration`.
        rules: layers that are exempt from it, see `layer_names.layer_is_exempt`.
    """

    scheme: Scheme
    calibration: CalibrationRun | None
    rules: LayerRules = field(default_factory=LayerRules)

    @property
    def keep_float(self) -> tuple[str, ...]:
        return self.rules.keep_float


class Exporter(Protocol):
    """One per format. Stateless; writes only below the given directory.

    Both methods raise `ConversionError` naming operator and layer when the model can't be converted, and check that
    what the vendor's converter wrote is there, not empty, and readable.
    """

    format: Format
    #: File suffix with its dot.
    suffix: str

    def unsupported(self, scheme: Scheme, rules: LayerRules) -> str | None:
        """What of this scheme the format or its runtime can't do, by name, with what to take instead; None when all
        is possible. Quick: it is asked before any work."""
        ...

    def export_float(self, model: Model, directory: Path) -> Artifact:
        """Write `directory/model_fp32<suffix>`. It is the float twin of every quantized file of this format."""
        ...

    def export_quantized(
        self, model: Model, float_artifact: Artifact, request: QuantizationRequest, directory: Path
    ) -> Artifact:
        """Write `directory/model<suffix>` from the same model, at `request.scheme` (fp16 included)."""
        ...

    def store_sparse(self, artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
        """The file with its zeros in the form that the runtime's sparse kernels take, below `directory`; the file
        itself where there are no such kernels, or none that fits. The findings say which, and why not."""
        ...


def check_keep_float(model: Model, patterns: Iterable[str]) -> None:
    """Raises UsageError for a pattern that matches no layer. A TensorFlow graph, whose layers aren't known, passes."""
    if model.module is not None:
        layers = _module_layers(model.module)
    elif model.native is not None and model.native.kind == "onnx":
        nodes = load(model.native.path, weights=False).graph.node
        # An ONNX target goes by scopes; a graph that is rebuilt in torch has layers named after its nodes.
        layers = {name for node in nodes for name in (*layer_names(node), as_attribute(node.name))}
    else:
        return
    check_patterns(layers, patterns, "keep-float")


def _module_layers(module: torch.nn.Module) -> set[str]:
    """Paths of all modules, and of those that only an exported program's operators remember."""
    import torch

    layers = set()
    for path, part in module.named_modules():
        layers.add(strip_wrapper(path))
        if isinstance(part, torch.fx.GraphModule):
            stacks = [node.meta.get("nn_module_stack") or {} for node in part.graph.nodes]
            layers |= {str(name) for stack in stacks for name, _ in stack.values()}
    return layers


def make_artifact(
    path: Path,
    *,
    format_: Format,
    precision: Precision,
    signature: Signature,
    history: tuple[StepRecord, ...],
    tools: Sequence[str],
    unquantized: tuple[UnquantizedOp, ...] = (),
    emulation: Path | None = None,
) -> Artifact:
    """Describe the file that was written; `tools` are the distributions that had a part in it.

    Raises ConversionError when the file isn't there or is empty.
    """
    if size_of(path) == 0:
        raise ConversionError("the converter wrote no file, or an empty one", where=str(path))
    return Artifact(
        path=path,
        format=format_,
        precision=precision,
        signature=signature,
        size_bytes=size_of(path),
        sha256=sha256_of(path),
        history=history,
        tools={name: version(name) for name in tools},
        unquantized_ops=unquantized,
        emulation=emulation,
    )
