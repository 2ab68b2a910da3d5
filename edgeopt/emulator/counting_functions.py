"""Which function of a library a piece of its code belongs to.

Runtimes come stripped: the functions that a library exports have names, of the others only the bounds are left, in the
tables for unwinding the stack. (ELF-64 object files, System V ABI; .eh_frame_hdr, Linux Standard Base Core 5.0, 10.6.2)
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PT_LOAD, _PT_GNU_EH_FRAME = 1, 0x6474E550
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_STT_FUNC = 2
_HEADER = struct.Struct("<32xQQ6xHHHH2x")  # where and how many the segments and the sections are
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
#: How GNU and LLVM linkers encode the search table: 4-byte signed numbers, relative to the table.
_TABLE_ENCODING = bytes((1, 0x1B, 0x03, 0x3B))


@dataclass(frozen=True, slots=True)
class Function:
    """
    Attributes:
        name: as exported, C++ names mangled; None where the library doesn't tell.
        address: its first instruction, as in the library's own addresses (what a disassembler shows).
    """

    name: str | None
    address: int


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


class Functions:
    """The functions of one library."""

    def __init__(self, path: Path) -> None:
        self._segments: list[_Segment] = []
        self._ends: dict[int, int] = {}
        self._names: dict[int, str] = {}
        # Where the file is gone or isn't such a file, what was read up to there has to do.
        with suppress(OSError, struct.error, ValueError, IndexError, OverflowError):
            self._read(path.read_bytes())
        self._starts = sorted(self._ends.keys() | self._names.keys())

    def at(self, offset: int) -> Function:
        """The function whose code lies at this place in the file. Between two known functions there may be others,
        such as hand-written assembly: they count as one, without a name."""
        address = self._address(offset)
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return Function(None, address)
        start = self._starts[index]
        end = self._ends.get(start)
        if end is not None and address >= end:
            return Function(None, end)
        return Function(self._names.get(start), start)

    def _address(self, offset: int) -> int:
        for segment in self._segments:
            if segment.kind == _PT_LOAD and segment.offset <= offset < segment.offset + segment.size:
                return offset - segment.offset + segment.address
        return offset

    def _read(self, data: bytes) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            return
        phoff, shoff, phsize, phnum, shsize, shnum = _HEADER.unpack_from(data)
        for index in range(phnum):
            kind, _, offset, address, _, size, _, _ = _SEGMENT.unpack_from(data, phoff + index * phsize)
            self._segments.append(_Segment(kind, offset, address, size))
        sections = [_SECTION.unpack_from(data, shoff + index * shsize) for index in range(shnum)]
        for segment in self._segments:
            if segment.kind == _PT_GNU_EH_FRAME:
                self._ends.update(self._bounds(data, segment))
        for section in sections:
            if section[1] in (_SHT_DYNSYM, _SHT_SYMTAB):
                self._read_symbols(data, section[4], section[5], sections[section[6]][4])

    def _bounds(self, data: bytes, table: _Segment) -> Iterator[tuple[int, int]]:
        """First address of each function and the one after its last, from the tables for unwinding."""
        if data[table.offset : table.offset + 4] != _TABLE_ENCODING:
            return
        (count,) = struct.unpack_from("<I", data, table.offset + 8)
        for index in range(count):
            start, entry = struct.unpack_from("<ii", data, table.offset + 12 + 8 * index)
            # An entry: length, distance to its common part, start relative to this field, number of bytes.
            place = table.offset + entry  # both sections lie in one segment
            relative, size = struct.unpack_from("<iI", data, place + 8)
            if table.address + entry + 8 + relative == table.address + start:
                yield table.address + start, table.address + start + size

    def _read_symbols(self, data: bytes, offset: int, size: int, names: int) -> None:
        for name, info, _, section, address, length in _SYMBOL.iter_unpack(data[offset : offset + size]):
            if info & 0xF != _STT_FUNC or not section:
                continue
            start = names + name
            self._names[address] = data[start : data.index(b"\0", start)].decode()
            if length:
                self._ends[address] = address + length
