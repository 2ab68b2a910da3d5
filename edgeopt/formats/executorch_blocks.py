"""What went into the opaque delegates of a .pte file: a small named entry that runtimes never load.

A delegate such as Ethos-U's holds a compiled command stream, from which nothing tells which operators it computes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgeopt.formats.executorch_layers import KEY as LAYERS_KEY
from edgeopt.formats.executorch_layers import Layers
from edgeopt.formats.executorch_layers import encode as encode_layers

#: Name of the entry among the file's named data.
KEY = "edgeopt.blocks"
#: More than any real table; keeps a hostile file from growing without bound.
_LARGEST = 1 << 26


@dataclass(frozen=True, slots=True)
class BlockTables:
    """What edgeopt adds to a file.

    Attributes:
        blocks: for each delegate call, in order, the operators inside: (type, path of the source layer or "").
        refusals: instruction of a portable kernel -> why the delegate did not take it.
    """

    blocks: Sequence[Sequence[tuple[str, str]]]
    refusals: Mapping[int, str]


def add_tables(program: bytes, layers: Layers, tables: BlockTables, *, segments: bool) -> bytes:
    """The .pte file with both tables in it; `segments`: delegates in segments of their own, or in the flatbuffer."""
    from executorch.exir._serialize._named_data_store import NamedDataStore
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    file = deserialize_pte_binary(program)
    file.program.segments = []  # one that is empty is not taken out by reading, and would shift the numbers of ours
    store = NamedDataStore()
    if file.named_data is not None:
        store.merge_named_data_store(file.named_data)
    store.add_named_data(LAYERS_KEY, encode_layers(layers), alignment=1)
    store.add_named_data(KEY, encode(tables), alignment=1)
    file.named_data = store.get_named_data_store_output()
    return bytes(serialize_pte_binary(file, extract_delegate_segments=segments))


def read_tables(program: bytes) -> BlockTables | None:
    """The table of a .pte file; None where it has none. Raises ValueError when it is damaged."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    named = deserialize_pte_binary(program).named_data
    entry = named.pte_data.get(KEY) if named is not None else None
    return decode(bytes(named.buffers[entry.buffer_index])) if entry is not None else None


def encode(tables: BlockTables) -> bytes:
    content = {"blocks": [[list(op) for op in block] for block in tables.blocks], "refusals": dict(tables.refusals)}
    return zlib.compress(json.dumps(content, separators=(",", ":"), sort_keys=True).encode(), 9)


def decode(data: bytes) -> BlockTables:
    """What `encode` has written. Raises ValueError when it is damaged."""
    try:
        content = json.loads(zlib.decompressobj().decompress(data, _LARGEST))
        return BlockTables(
            blocks=tuple(tuple((str(type_), str(layer)) for type_, layer in block) for block in content["blocks"]),
            refusals={int(place): str(reason) for place, reason in content["refusals"].items()},
        )
    except (zlib.error, AttributeError, TypeError, LookupError) as error:
        raise ValueError("a damaged table of blocks") from error
