"""The table of delegated operators inside a .pte file."""

from __future__ import annotations

import zlib

import pytest

from edgeopt.formats.executorch_blocks import BlockTables, decode, encode

TABLES = BlockTables(blocks=((("aten.add.Tensor", "body.0"), ("aten.cat.default", "")), ()), refusals={3: "no sort"})


def test_a_table_survives_the_round_trip() -> None:
    assert decode(encode(TABLES)) == TABLES


def test_the_same_table_gives_the_same_bytes() -> None:
    assert encode(TABLES) == encode(BlockTables(TABLES.blocks, dict(TABLES.refusals)))


@pytest.mark.parametrize("damage", [b"", b"no table", zlib.compress(b"{}"), zlib.compress(b'{"blocks":[[1]]}')])
def test_a_damaged_table_is_a_value_error(damage: bytes) -> None:
    with pytest.raises(ValueError):
        decode(damage)
