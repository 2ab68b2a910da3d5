"""Source layers inside a .pte file: a small named entry that runtimes never load, and that tools can match by."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

#: Name of the entry among the file's named data.
KEY = "edgeopt.layers"
#: More than any real table; keeps a hostile file from growing without bound.
_LARGEST = 1 << 26

#: Instruction of a portable kernel, or (instruction, debug handle) inside a delegate -> path of the source layer.
Layers = Mapping[int | tuple[int, int], str]


def add_layers(program: bytes, layers: Layers) -> bytes:
    """The .pte file with that table in it; every other byte of data stays as it is."""
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir.schema import Buffer

    file = deserialize_pte_binary(program)
    if file.program.segments:
        # ExecuTorch's reader empties this list, save where the file holds no data (no weights, no delegate). Its writer
        # would then count the entries twice, and the table's index would be another's.
        file.program.segments = []
        file.program.constant_buffer = [Buffer(storage=b"")]
    store = NamedDataStore()
    if file.named_data is not None:
        store.merge_named_data_store(file.named_data)
    store.add_named_data(KEY, encode(layers), alignment=1)
    file.named_data = store.get_named_data_store_output()
    return bytes(serialize_pte_binary(file, extract_delegate_segments=True))


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
