"""What the compiler's parser knows: files with anything newer are refused as a whole.

Sources as in `rules`: [study], and [#n] for issues of github.com/google-coral/edgetpu.
"""

from __future__ import annotations

from edgeopt.accelerators.edge_tpu.alternatives import INSTEAD
from edgeopt.accelerators.edge_tpu.graph import Operator
from edgeopt.accelerators.edge_tpu.rules import UNSUPPORTED, VERSION, Refusal

#: [study, #147, fast-plate-ocr#38] Newest versions that the compiler's parser (of TensorFlow 2.5) knows. Anything newer
#: and it refuses the file: "Didn't find op for builtin opcode 'CONV_2D' version '6' ... Registration failed".
_NEWEST = {"CONV_2D": 5, "EXP": 1, "QUANTIZE": 2, "TRANSPOSE": 5, "TRANSPOSE_CONV": 3}
#: Numbers from here on (GELU is the first) were given after that.
_FIRST_UNKNOWN_CODE = 150


def unknown(operator: Operator) -> Refusal | None:
    """Why the compiler's parser stops at this operator and refuses the whole file; None where it does not."""
    if operator.is_custom:
        if operator.type.startswith("Flex"):  # [#718]
            return Refusal(UNSUPPORTED, "a TensorFlow operator", "convert with built-in operators only")
        return None
    if operator.code >= _FIRST_UNKNOWN_CODE:
        return Refusal(UNSUPPORTED, "unknown to the compiler", INSTEAD.get(operator.type))
    newest = _NEWEST.get(operator.type)
    if newest is not None and operator.version > newest:
        return Refusal(VERSION, f"version {operator.version}, known up to {newest}", "export in an older form")
    return None
