"""What turns a quantized .tflite file into the form that the Edge TPU compiler accepts, one function per rewrite.

Each changes a graph in place, so that it computes what it computed before, and tells how often it found work. What
the compiler wants is said in `edgeopt.formats.edge_tpu_form`, whose rules decide here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgeopt.exporter.litert_edge_tpu_editor import Editor
from edgeopt.exporter.litert_edge_tpu_gelu import spell_out_gelu
from edgeopt.exporter.litert_edge_tpu_kernels import (
    split_fused_activations,
    split_groups,
    write_products_as_convolutions,
)
from edgeopt.exporter.litert_edge_tpu_means import average_before_moves, keep_mean_rank
from edgeopt.exporter.litert_edge_tpu_signals import convolve_channels_as_rows, even_dilations, pad_before_moves
from edgeopt.formats import edge_tpu_rules as rules
from edgeopt.formats.edge_tpu_form import signature_of
from edgeopt.formats.edge_tpu_versions import needed_version

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

#: Rewrites whose operators round otherwise than the one that they replace; all others are exact to the bit.
INEXACT = frozenset({"GELU spelled out", "products as convolutions"})
#: What applications read; LiteRT's other entries describe the file as it was before.
_KEPT_METADATA = frozenset({b"TFLITE_METADATA"})


def rewrite(model: schema.ModelT) -> Mapping[str, int]:
    """Apply every rewrite, in place. Buffers must be inline.

    Returns:
        How often each one that found work did something, by its name.
    """
    editor = Editor(model)
    counts: dict[str, int] = {}
    for name, function in _REWRITES.items():
        if count := function(editor):
            counts[name] = count
    editor.sweep(_KEPT_METADATA)
    if count := number_versions(editor):
        counts["operator versions"] = count
    return counts


def narrow_paddings(editor: Editor) -> int:
    """Paddings as int32: the compiler reads the bytes as that, whatever the type says."""
    found = [op for op in editor.graph.operators if rules.has_wide_paddings(editor, op)]
    for op in found:
        values = editor.constant(editor.inputs(op)[1])
        if values is not None:
            narrow = editor.add_constant(values.astype(np.int32), f"{editor.tensor_name(editor.outputs(op)[0])}/1")
            op.inputs = np.array([op.inputs[0], narrow, *op.inputs[2:]], np.int32)
    return len(found)


def write_padv2_as_pad(editor: Editor) -> int:
    """PADV2 as PAD where it pads with zero; the Edge TPU has PAD only."""
    from ai_edge_litert import schema_py_generated as schema

    found = [op for op in editor.graph.operators if rules.pads_with_zero(editor, op)]
    for op in found:
        inputs, (output,) = editor.inputs(op), editor.outputs(op)
        editor.turn_into(op, editor.make("PAD", inputs[:2], output, schema.PadOptionsT()))
    return len(found)


def write_moves_as_reshapes(editor: Editor) -> int:
    """Transposes and gathers that keep all elements in their order as RESHAPE."""
    from ai_edge_litert import schema_py_generated as schema

    found = [op for op in editor.graph.operators if rules.moves_nothing(editor, op)]
    for op in found:
        (output,) = editor.outputs(op)
        shape = editor.add_constant(np.array(editor.shape(output), np.int32), f"{editor.tensor_name(output)}/1")
        editor.turn_into(op, editor.make("RESHAPE", (editor.inputs(op)[0], shape), output, schema.ReshapeOptionsT()))
    return len(found)


def merge_reshapes(editor: Editor) -> int:
    """A reshape of a reshape reads what the first one reads."""
    found, producers = 0, editor.producers()
    for op in editor.graph.operators:
        first = producers.get(editor.inputs(op)[0]) if editor.kind(op) == "RESHAPE" else None
        if first is not None and editor.kind(first) == "RESHAPE":
            op.inputs = np.array([editor.inputs(first)[0], *editor.inputs(op)[1:]], np.int32)
            found += 1
    return found


def drop_identities(editor: Editor) -> int:
    """Take out operators whose output is their input."""
    return sum(rules.is_identity(editor, op) and editor.bypass(op) for op in list(editor.graph.operators))


def number_versions(editor: Editor) -> int:
    """Give every operator the oldest version that describes it, and codes that old readers know.

    An operator that this doesn't know keeps its version. Returns how many operators got a lower one.
    """
    from ai_edge_litert import schema_py_generated as schema

    lowered, keys = 0, []
    for op in editor.graph.operators:
        old = editor.model.operatorCodes[op.opcodeIndex]
        needed = None if old.customCode else needed_version(signature_of(editor, op))
        version = old.version if needed is None else needed
        lowered += version < old.version
        keys.append((max(old.builtinCode, old.deprecatedBuiltinCode), version, old.customCode))
    distinct = list(dict.fromkeys(keys))
    for op, key in zip(editor.graph.operators, keys, strict=True):
        op.opcodeIndex = distinct.index(key)
    editor.model.operatorCodes = []
    for number, version, custom in distinct:
        code = schema.OperatorCodeT()
        # Readers of old files look at the deprecated field, which holds what fits in a signed byte.
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        code.customCode = custom
        editor.model.operatorCodes.append(code)
    return lowered


_REWRITES: Mapping[str, Callable[[Editor], int]] = {
    "int32 paddings": narrow_paddings,
    "PADV2 as PAD": write_padv2_as_pad,
    "groups as convolutions": split_groups,
    "products as convolutions": write_products_as_convolutions,
    "activations of their own": split_fused_activations,
    "even dilations": even_dilations,
    "GELU spelled out": spell_out_gelu,
    "paddings before moves": pad_before_moves,
    "channels as rows": convolve_channels_as_rows,
    "moves as reshapes": write_moves_as_reshapes,
    "means before moves": average_before_moves,
    "means of full rank": keep_mean_rank,
    "reshapes merged": merge_reshapes,
    "operators without readers": Editor.drop_unused_operators,
    "identities": drop_identities,
}
