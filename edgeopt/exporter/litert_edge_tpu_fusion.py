"""Activations of a float .tflite file as part of the operator before them.

ai-edge-quantizer has no int8 form for some of them on their own, RELU6 among them; LiteRT's converter leaves them
alone behind a transposed convolution.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from edgeopt.exporter.litert_edge_tpu_editor import Editor

if TYPE_CHECKING:
    from ai_edge_litert import schema_py_generated as schema

_FUSING = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED", "ADD", "SUB", "MUL"})
_ACTIVATIONS = frozenset({"RELU", "RELU6", "RELU_N1_TO_1"})


def fuse_activations(editor: Editor) -> int:
    """Fuse every activation that is the only reader of an operator which can have one, in place; how many."""
    from ai_edge_litert import schema_py_generated as schema

    found = 0
    for op in list(editor.graph.operators):
        producer = _producer(editor, op) if editor.kind(op) in _ACTIVATIONS else None
        if producer is None:
            continue
        activation = getattr(schema.ActivationFunctionType, editor.kind(op))
        if editor.bypass(op):
            producer.builtinOptions = copy.copy(producer.builtinOptions)
            producer.builtinOptions.fusedActivationFunction = activation
            found += 1
    return found


def _producer(editor: Editor, op: schema.OperatorT) -> schema.OperatorT | None:
    source = editor.inputs(op)[0]
    producer = editor.producers().get(source)
    if producer is None or editor.kind(producer) not in _FUSING or source in editor.borders()[1]:
        return None
    alone = len(editor.readers()[source]) == 1 and not editor.options(producer).get("fusedActivationFunction")
    return producer if alone and editor.dtype(source) == "FLOAT32" else None
