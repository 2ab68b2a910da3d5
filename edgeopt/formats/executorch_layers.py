"""Source layers inside a .pte file: a small named entry that runtimes never load, and that tools can match by."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

#: Name of the entry among the file's named data.
KEY = "edgeopt.layers"
#: More than any real table; keeps a hostile file from growing without bound.
_LARGEST = 1 << 26
#: Enough to see whether a file has an extended header.
_HEAD_BYTES = 64
#: Of ExecuTorch's writer, unless it is told otherwise.
_SEGMENT_ALIGNMENT = 128
_COPIED_AT_ONCE = 1 << 20

#: Instruction of a portable kernel, or (instruction, debug handle) inside a delegate -> path of the source layer.
Layers = Mapping[int | tuple[int, int], str]


def add_layers(path: Path, layers: Layers) -> None:
    """Put that table into a .pte file, in place; every other byte of data stays as it is and is never in memory."""
    from executorch.exir._serialize._program import _get_extended_header
    from executorch.exir._serialize.padding import aligned_size

    data = encode(layers)
    partial = path.with_name(f"{path.name}.partial")
    with path.open("rb") as file:
        header = _get_extended_header(file.read(_HEAD_BYTES))
        # A file without weights and delegates has no such header: nothing stands behind its flatbuffer.
        taken = header.segment_data_size if header is not None else 0
        at = aligned_size(taken, _SEGMENT_ALIGNMENT)
        file.seek(0)
        head = _with_entry(file.read(header.program_size if header is not None else -1), at, len(data))
        if header is not None:
            file.seek(header.segment_base_offset)
        with partial.open("wb") as result:
            result.write(head)
            shutil.copyfileobj(file, result, _COPIED_AT_ONCE)
            result.write(bytes(at - taken) + data)
    partial.replace(path)


def _with_entry(head: bytes, at: int, size: int) -> bytes:
    """What stands before the segments, with one more of `size` bytes that begins `at` behind the first one's start.

    The layout is that of ExecuTorch's schema/README: flatbuffer with an extended header in it, then aligned segments.
    """
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program, _program_to_flatbuffer
    from executorch.exir._serialize._program import _ExtendedHeader, _insert_flatbuffer_header
    from executorch.exir._serialize.padding import aligned_size, pad_to
    from executorch.exir.schema import DataSegment, NamedData
    from executorch.exir.tensor import ALIGNMENT

    program = _flatbuffer_to_program(head)
    program.named_data = [*(program.named_data or []), NamedData(key=KEY, segment_index=len(program.segments))]
    program.segments.append(DataSegment(offset=at, size=size))
    flatbuffer = _program_to_flatbuffer(program, constant_tensor_alignment=ALIGNMENT)
    room = aligned_size(_ExtendedHeader.EXPECTED_LENGTH, flatbuffer.max_alignment)
    whole = room + len(flatbuffer.data)
    base = aligned_size(whole, _SEGMENT_ALIGNMENT)
    header = _ExtendedHeader(program_size=whole, segment_base_offset=base, segment_data_size=at + size)
    placed = _insert_flatbuffer_header(flatbuffer.data, r"ET[0-9a-zA-Z][0-9a-zA-Z]", pad_to(header.to_bytes(), room))
    return bytes(pad_to(placed, base))


def encode(layers: Layers) -> bytes:
    """Each layer once, with the places of its operators, as compressed JSON."""
    places: dict[str, list[int | tuple[int, int]]] = {}
    for place, layer in layers.items():
        if layer:
            places.setdefault(layer, []).append(place)
    return zlib.compress(json.dumps(places, separators=(",", ":")).encode(), 9)


def decode(data: bytes) -> dict[int | tuple[int, int], str]:
    """What `encode` has written. Raises ValueError when it is damaged."""
    try:
        decompressor = zlib.decompressobj()
        places = json.loads(decompressor.decompress(data, _LARGEST))
        return {
            (place if isinstance(place, int) else (int(place[0]), int(place[1]))): str(layer)
            for layer, found in places.items()
            for place in found
        }
    except (zlib.error, AttributeError, TypeError, IndexError) as error:
        raise ValueError("a damaged table of layers") from error
