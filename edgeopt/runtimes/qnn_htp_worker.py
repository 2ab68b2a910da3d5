"""The process in which Qualcomm's emulator runs: its library prints at will, and takes the process along when it fails.

Started by `edgeopt.runtimes.qnn_htp_process`. A message is a line of JSON and the bytes of the arrays that it lists;
the first one opens a file, the others run it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from edgeopt.telemetry import opt_out
from edgeopt.types import Array

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "QNNExecutionProvider"


@dataclass(frozen=True, slots=True)
class Message:
    """`fields` are JSON values; arrays keep their order and names."""

    fields: Mapping[str, object]
    arrays: Mapping[str, Array]


def send(stream: IO[bytes], fields: Mapping[str, object], arrays: Mapping[str, Array] | None = None) -> None:
    listed = [(name, a.dtype.name, a.shape) for name, a in (arrays or {}).items()]
    stream.write(json.dumps({"fields": dict(fields), "arrays": listed}).encode() + b"\n")
    for array in (arrays or {}).values():
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> Message | None:
    """The next message; None when the other side has gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    head = json.loads(line)
    arrays = {}
    for name, dtype, shape in head["arrays"]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        data = stream.read(size)
        if len(data) != size:
            return None
        arrays[name] = np.frombuffer(data, dtype=dtype).reshape(shape)
    return Message(head["fields"], arrays)


def open_session(request: Mapping[str, object]) -> onnxruntime.InferenceSession:
    """A session that the QNN provider takes part in.

    Raises whatever ONNX Runtime raises when the provider can't be made or the file is refused: unlike its default, it
    does not go on without the provider.
    """
    opt_out()
    import onnxruntime as ort
    import onnxruntime_qnn

    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    options = ort.SessionOptions()
    options.log_severity_level = 0 if request["verbose"] else 3
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    for key, value in _pairs(request["session"]):
        options.add_session_config_entry(key, value)
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    provider = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **dict(_pairs(request["provider"]))}
    options.add_provider_for_devices(devices[:1], provider)
    path = Path(str(request["path"]))
    if _has_weights_beside_it(path):
        return ort.InferenceSession(str(path), options, enable_fallback=0)
    # By its bytes: the path would be hashed into the names inside a context binary.
    return ort.InferenceSession(path.read_bytes(), options, enable_fallback=0)


def _has_weights_beside_it(path: Path) -> bool:
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    return any(onnx.external_data_helper.uses_external_data(tensor) for tensor in proto.graph.initializer)


def _pairs(given: object) -> Sequence[tuple[str, str]]:
    return [(str(key), str(value)) for key, value in given.items()] if isinstance(given, dict) else []


def _assignment(session: onnxruntime.InferenceSession) -> list[tuple[str, str, str]]:
    """(provider, name, type) of each node of the partitioned graph."""
    graphs = session.get_provider_graph_assignment_info()
    return [(graph.ep_name, node.name, node.op_type) for graph in graphs for node in graph.get_nodes()]


def serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    """Answer until the other side closes."""
    first = receive(requests)
    if first is None:
        return
    try:
        session = open_session(first.fields)
        send(replies, {"assignment": _assignment(session)})
    # The bindings raise a dozen unrelated classes; the parent tells what was refused.
    except Exception as error:
        send(replies, {"error": str(error)})
        return
    while (message := receive(requests)) is not None:
        names = [output.name for output in session.get_outputs()]
        try:
            values = session.run(names, dict(message.arrays))
        except Exception as error:
            send(replies, {"error": str(error)})
            continue
        send(replies, {}, dict(zip(names, values, strict=True)))


def main() -> None:
    # The vendor's library prints to the standard output, which is ours to answer on.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
