"""Weights as codes into a small table of real values: signed powers of two, or the centres of a 1-D k-means.

They save storage only: a runtime expands them when it loads the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeopt.calibration.weights import rows_to_shape, to_rows
from edgeopt.types import Array, Scheme

#: Rounds of Lloyd's algorithm; it nearly always settles before.
_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """A weight as codes.

    Attributes:
        codes: uint8 (4-bit codes too), shaped as the weight.
        table: float32 of shape (2^bits,) per tensor, (channels, 2^bits) per channel, (channels, groups, 2^bits) per
            group; ascending along the last axis.
        axis: the weight's output channels; None per tensor.
        group_size: as in `edgeopt.calibration.weights.QuantizedWeight`.
    """

    codes: Array
    table: Array
    axis: int | None
    group_size: int | None

    def expand(self) -> Array:
        """The real weight, float32."""
        codes = to_rows(self.codes, self.axis)
        tables = self.table.reshape(codes.shape[0], -1, self.table.shape[-1])
        group = np.arange(codes.shape[1]) // (self.group_size or max(codes.shape[1], 1))
        real = tables[np.arange(codes.shape[0])[:, None], group, codes]
        return rows_to_shape(real, self.codes.shape, self.axis)


def code_weight(weight: Array, scheme: Scheme, axis: int | None) -> CodedWeight:
    """Code a float weight with the table entries nearest to its values.

    Args:
        weight: real values of any shape.
        scheme: `weight_values` ("logarithmic" or "k-means"), `weight_bits`, `weight_granularity` and `group_size`
            count.
        axis: of the output channels; None where there are none, which makes it per-tensor.

    A logarithmic table holds zero and +-2^e for the 2^(bits-1) - 1 exponents up to the one that fits the largest
    magnitude with the least squared error (zero twice, since 2^bits is even). A k-means table minimizes the squared
    error by Lloyd's algorithm from evenly spaced quantiles; where a weight has fewer values than the table, it is
    exact and the last entries repeat.

    Raises:
        ValueError: when the scheme's weights are linear, or neither 4 nor 8 bits wide.
    """
    if scheme.weight_bits not in (4, 8) or scheme.weight_values == "linear":
        raise ValueError(f"{scheme.weight_values} weights of {scheme.precision} have no codebook")
    if scheme.weight_granularity == "per-tensor":
        axis = None
    rows = to_rows(np.asarray(weight, dtype=np.float32), axis)
    grouped = scheme.weight_granularity == "per-group" and axis is not None
    size = min(scheme.group_size, max(rows.shape[1], 1)) if grouped else max(rows.shape[1], 1)
    make = _logarithmic if scheme.weight_values == "logarithmic" else _k_means
    entries = 2**scheme.weight_bits
    codes = np.empty(rows.shape, dtype=np.uint8)
    tables = []
    for row, row_codes in zip(rows, codes, strict=True):
        for start in range(0, rows.shape[1], size):
            values = row[start : start + size]
            table = make(values, entries)
            row_codes[start : start + size] = _nearest(values, table)
            tables.append(table)
    leading: tuple[int, ...] = (rows.shape[0], -1) if grouped else (rows.shape[0],) if axis is not None else ()
    return CodedWeight(
        codes=rows_to_shape(codes, np.shape(weight), axis),
        table=np.array(tables, dtype=np.float32).reshape(*leading, entries),
        axis=axis,
        group_size=size if grouped else None,
    )


def _nearest(values: Array, table: Array) -> Array:
    """Index of the entry nearest to each value; the table is ascending."""
    middles = (table[1:].astype(np.float64) + table[:-1]) / 2
    indices: Array = np.searchsorted(middles, values)
    return indices


def _logarithmic(values: Array, entries: int) -> Array:
    largest = float(np.abs(values).max(initial=0))
    if largest == 0.0:
        return np.zeros(entries, dtype=np.float32)
    tables = []
    for top in (np.floor(np.log2(largest)), np.ceil(np.log2(largest))):
        powers = np.exp2(top - np.arange(entries // 2 - 1)[::-1])
        tables.append(np.concatenate([-powers[::-1], [0.0, 0.0], powers]).astype(np.float32))
    return min(tables, key=lambda table: _squared_error(values, table))


def _squared_error(values: Array, table: Array) -> float:
    rest = values - table[_nearest(values, table)]
    return float(np.dot(rest, rest))


def _k_means(values: Array, entries: int) -> Array:
    """Centres by Lloyd's algorithm. On sorted values each cluster is a slice, so a round costs only the centres."""
    distinct = np.unique(values)
    if distinct.size <= entries:
        return np.pad(distinct, (0, entries - distinct.size), mode="edge").astype(np.float32)
    ordered = np.sort(values).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    # Quantiles of the distinct values, so that a heap of equal weights (pruned ones) takes one centre, not all.
    centres = distinct[np.linspace(0, distinct.size - 1, 2 * entries + 1)[1::2].astype(int)].astype(np.float64)
    for _ in range(_ROUNDS):
        bounds = np.concatenate([[0], np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2), [ordered.size]])
        counts = np.diff(bounds)
        moved = np.where(counts > 0, np.diff(sums[bounds]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    table: Array = centres.astype(np.float32)
    return table
