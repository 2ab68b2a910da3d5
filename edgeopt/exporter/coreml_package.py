"""A Core ML model in memory -> an .mlpackage whose bytes depend on the model alone."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import ConversionError
from edgeopt.formats.coreml_program import LAYERS_KEY, MANIFEST, SPEC, WEIGHTS, read_program

if TYPE_CHECKING:
    from coremltools.models import MLModel

_AUTHOR = "com.apple.CoreML"
#: What coremltools notes that is no property of the model.
_DATE = "com.github.apple.coremltools.conversion_date"
#: Part -> what the manifest says of it.
_PARTS = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}


def write_package(mlmodel: MLModel, layers: Mapping[str, str], path: Path) -> None:
    """Write `path`, replacing what is there.

    coremltools' own `save` numbers the parts at random and leaves a debugging file behind.

    Args:
        layers: name of an operator -> path of its source layer; kept in the metadata for whoever reads the file.

    Raises ConversionError when the result can't be read again.
    """
    spec = mlmodel.get_spec()
    metadata = spec.description.metadata.userDefined
    if _DATE in metadata:
        del metadata[_DATE]
    by_layer: dict[str, list[str]] = {}
    for name, layer in sorted(layers.items()):
        by_layer.setdefault(layer, []).append(name)
    metadata[LAYERS_KEY] = json.dumps(by_layer, sort_keys=True, separators=(",", ":"))
    if path.exists():
        shutil.rmtree(path)
    (path / WEIGHTS).parent.mkdir(parents=True)
    (path / SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    weights = Path(mlmodel.weights_dir or "", WEIGHTS.name)
    if weights.is_file():
        shutil.copyfile(weights, path / WEIGHTS)
    (path / MANIFEST).write_text(_manifest())
    if not read_program(path).main.operations:
        raise ConversionError("coremltools wrote a program without operators", where=str(path))


def _manifest() -> str:
    identifiers = {part: str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{part}.{_AUTHOR}")) for part in _PARTS}
    entries = {
        identifiers[part]: {
            "author": _AUTHOR,
            "description": description,
            "name": part,
            "path": f"{_AUTHOR}/{part}",
        }
        for part, description in _PARTS.items()
    }
    content = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": dict(sorted(entries.items())),
        "rootModelIdentifier": identifiers["model.mlmodel"],
    }
    return json.dumps(content, indent=4) + "\n"
