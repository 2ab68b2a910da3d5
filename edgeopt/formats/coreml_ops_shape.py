"""MIL operators that move values, or make tensors of shapes and indices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from edgeopt.formats.coreml_values import TORCH_TYPES, Arguments, Operator


def _reshape(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    # A 0 stands for the input's size at that place.
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(a.ints("shape"))])


def _expand_dims(a: Arguments) -> torch.Tensor:
    x, axes = a.tensor(), a.ints("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    return x.squeeze(tuple(a.ints("axes"))) if "axes" in a else x.squeeze()


def _concat(a: Arguments) -> torch.Tensor:
    parts, axis = a.tensors(), a.integer("axis")
    if not a.flag("interleave", default=False):
        return torch.cat(parts, axis)
    axis %= parts[0].ndim
    return torch.stack(parts, axis + 1).flatten(axis, axis + 1)


def _split(a: Arguments) -> tuple[torch.Tensor, ...]:
    x, axis = a.tensor(), a.integer("axis")
    if "split_sizes" in a:
        return tuple(torch.split(x, a.ints("split_sizes"), axis))
    return tuple(torch.split(x, x.shape[axis] // a.integer("num_splits"), axis))


def _slices(a: Arguments) -> tuple[list[slice], list[int]]:
    """The slice along every axis, with the axes that are taken backwards, and the axes that go."""
    x = a.tensor()
    begins, ends = a.ints("begin"), a.ints("end")
    strides = a.ints("stride", [1] * x.ndim)
    from_start, to_end = a.flags("begin_mask", x.ndim), a.flags("end_mask", x.ndim)
    squeezed = a.flags("squeeze_mask", x.ndim)
    slices = []
    for axis, stride in enumerate(strides):
        if squeezed[axis]:
            place = begins[axis] % x.shape[axis]
            slices.append(slice(place, place + 1, 1))
        else:
            first = None if from_start[axis] else begins[axis]
            last = None if to_end[axis] else ends[axis]
            slices.append(slice(first, last, stride))
    return slices, [axis for axis, gone in enumerate(squeezed) if gone]


def _slice_by_index(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    slices, squeezed = _slices(a)
    for axis, part in enumerate(slices):
        if part.step > 0:
            x = x[(slice(None),) * axis + (part,)]
        else:  # torch has no negative steps
            x = x.index_select(axis, torch.tensor(_indices(part, x.shape[axis]), dtype=torch.long))
    return x.squeeze(tuple(squeezed)) if squeezed else x


def _indices(part: slice, size: int) -> list[int]:
    return list(range(*part.indices(size)))


def _slice_update(a: Arguments) -> torch.Tensor:
    x = a.tensor().clone()
    slices, squeezed = _slices(a)
    update = a.tensor("update")
    for axis in squeezed:
        update = update.unsqueeze(axis)
    x[tuple(slices)] = update
    return x


def _slice_by_size(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    for axis, (begin, size) in enumerate(zip(a.ints("begin"), a.ints("size"), strict=True)):
        begin %= x.shape[axis]
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


def _pad(a: Arguments) -> torch.Tensor:
    """`pad` has (before, after) for each of the last dimensions, first of them first; torch wants the last first."""
    x, amounts = a.tensor(), a.ints("pad")
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    while pairs and pairs[0] == [0, 0]:
        pairs.pop(0)
    reversed_ = [amount for pair in reversed(pairs) for amount in pair]
    mode = a.text("mode", "constant")
    if not reversed_:
        return x
    if mode == "constant":
        return functional.pad(x, reversed_, value=a.number("constant_val", 0.0))
    # torch reflects the last dimensions of a batch; leading ones are put together to be one.
    leading = x.shape[: x.ndim - len(pairs)]
    padded = functional.pad(x.reshape(1, -1, *x.shape[x.ndim - len(pairs) :]), reversed_, mode=mode)
    return padded.reshape(*leading, *padded.shape[2:])


def _tile(a: Arguments) -> torch.Tensor:
    return a.tensor().tile(a.ints("reps"))


def _crop(a: Arguments) -> torch.Tensor:
    x = a.tensor()
    (top, bottom), (left, right) = a.ints("crop_height"), a.ints("crop_width")
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _gather(a: Arguments) -> torch.Tensor:
    x, indices = a.tensor(), a.tensor("indices").long()
    axis, batch = a.integer("axis", 0) % x.ndim, a.integer("batch_dims", 0)
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if batch == 0:
        picked = x.index_select(axis, indices.reshape(-1))
        return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    lead = x.shape[:batch]
    flat_x, flat_indices = x.reshape(-1, *x.shape[batch:]), indices.reshape(-1, *indices.shape[batch:])
    parts = [
        part.index_select(axis - batch, index.reshape(-1)) for part, index in zip(flat_x, flat_indices, strict=True)
    ]
    return torch.stack(parts).reshape(*lead, *x.shape[batch:axis], *indices.shape[batch:], *x.shape[axis + 1 :])


def _gather_along_axis(a: Arguments) -> torch.Tensor:
    x, indices, axis = a.tensor(), a.tensor("indices").long(), a.integer("axis", 0)
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))


def _nd_index(x: torch.Tensor, indices: torch.Tensor, batch: int) -> tuple[torch.Tensor, ...]:
    """Advanced index for the last dimension of `indices`, one tensor per dimension of `x` that it picks from."""
    grids = [
        torch.arange(size).reshape([-1 if axis == own else 1 for axis in range(indices.ndim - 1)])
        for own, size in enumerate(x.shape[:batch])
    ]
    return (*grids, *indices.unbind(-1))


def _gather_nd(a: Arguments) -> torch.Tensor:
    x, indices = a.tensor(), a.tensor("indices").long()
    return x[_nd_index(x, indices, a.integer("batch_dims", 0))]


_MERGE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _scattered(data: torch.Tensor, index: tuple[torch.Tensor | slice, ...], a: Arguments) -> torch.Tensor:
    result, updates = data.clone(), a.tensor("updates")
    mode = a.text("mode", "add")
    if mode == "update":
        result[index] = updates.to(result.dtype)
    elif mode == "add":
        # Places that occur twice are added to twice.
        picks = torch.arange(result.numel()).reshape(result.shape)[index].reshape(-1)
        result.reshape(-1).index_add_(0, picks, updates.to(result.dtype).expand(result[index].shape).reshape(-1))
    else:
        result[index] = _MERGE[mode](result[index], updates).to(result.dtype)
    return result


def _scatter(a: Arguments) -> torch.Tensor:
    data, indices = a.tensor("data"), a.tensor("indices").long()
    axis = a.integer("axis", 0) % data.ndim
    indices = torch.where(indices < 0, indices + data.shape[axis], indices)
    return _scattered(data, (*[slice(None)] * axis, indices), a)


def _scatter_along_axis(a: Arguments) -> torch.Tensor:
    data, indices = a.tensor("data"), a.tensor("indices").long()
    axis = a.integer("axis", 0) % data.ndim
    places = torch.meshgrid(*[torch.arange(size) for size in indices.shape], indexing="ij")
    wrapped = torch.where(indices < 0, indices + data.shape[axis], indices)
    return _scattered(data, tuple(wrapped if own == axis else grid for own, grid in enumerate(places)), a)


def _scatter_nd(a: Arguments) -> torch.Tensor:
    return _scattered(a.tensor("data"), tuple(a.tensor("indices").long().unbind(-1)), a)


def _select(a: Arguments) -> torch.Tensor:
    return torch.where(a.tensor("cond"), a.tensor("a"), a.tensor("b"))


def _one_hot(a: Arguments) -> torch.Tensor:
    indices, axis = a.tensor("indices").long(), a.integer("axis", -1)
    hot = functional.one_hot(indices, a.integer("one_hot_vector_size")).bool().movedim(-1, axis)
    on, off = a.optional("on_value"), a.optional("off_value")
    return torch.where(hot, torch.tensor(1) if on is None else on, torch.tensor(0) if off is None else off)


def _fill(a: Arguments) -> torch.Tensor:
    return torch.full(a.ints("shape"), a.number("value", 0.0)).to(a.output_type())


def _fill_like(a: Arguments) -> torch.Tensor:
    return torch.full(a.tensor("ref_tensor").shape, a.number("value", 0.0)).to(a.output_type())


def _range(a: Arguments) -> torch.Tensor:
    start = a.tensor("start")
    ends = (start.item(), a.tensor("end").item(), a.tensor("step").item())
    return torch.arange(*ends, dtype=start.dtype)


def _depth_to_space(a: Arguments) -> torch.Tensor:
    x, block = a.tensor(), a.integer("block_size")
    n, c, h, w = x.shape
    spread = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return spread.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(a: Arguments) -> torch.Tensor:
    x, block = a.tensor(), a.integer("block_size")
    n, c, h, w = x.shape
    gathered = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return gathered.reshape(n, c * block**2, h // block, w // block)


def _sliding_windows(a: Arguments) -> torch.Tensor:
    axis = a.integer("axis") % a.tensor().ndim
    return a.tensor().unfold(axis, a.integer("size"), a.integer("stride", 1)).movedim(-1, axis + 1)


def _flatten(a: Arguments) -> torch.Tensor:
    x, axis = a.tensor(), a.integer("axis", 1) % max(a.tensor().ndim, 1)
    return x.reshape(int(torch.Size(x.shape[:axis]).numel()), -1)


def _space_to_batch(a: Arguments) -> torch.Tensor:
    x, (rows, columns) = a.tensor(), a.ints("block_shape")
    top, bottom, left, right = a.ints("paddings")
    x = functional.pad(x, [left, right, top, bottom])
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // rows, rows, w // columns, columns).permute(3, 5, 0, 1, 2, 4)
    return blocks.reshape(n * rows * columns, c, h // rows, w // columns)


def _batch_to_space(a: Arguments) -> torch.Tensor:
    x, (rows, columns) = a.tensor(), a.ints("block_shape")
    top, bottom, left, right = a.ints("crops")
    n, c, h, w = x.shape
    count = n // (rows * columns)
    whole = x.reshape(rows, columns, count, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(count, c, h * rows, w * columns)
    return whole[:, :, top : h * rows - bottom, left : w * columns - right]


SHAPE: dict[str, Operator] = {
    "batch_to_space": _batch_to_space,
    "concat": _concat,
    "crop": _crop,
    "depth_to_space": _depth_to_space,
    "expand_dims": _expand_dims,
    "flatten2d": _flatten,
    "gather": _gather,
    "gather_along_axis": _gather_along_axis,
    "gather_nd": _gather_nd,
    "pad": _pad,
    "pixel_shuffle": lambda a: functional.pixel_shuffle(a.tensor(), a.integer("upscale_factor")),
    "pixel_unshuffle": lambda a: functional.pixel_unshuffle(a.tensor(), a.integer("downscale_factor")),
    "reshape": _reshape,
    "reverse": lambda a: a.tensor().flip(a.ints("axes", range(a.tensor().ndim))),
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
    "sliding_windows": _sliding_windows,
    "space_to_batch": _space_to_batch,
    "space_to_depth": _space_to_depth,
    "split": _split,
    "squeeze": _squeeze,
    "stack": lambda a: torch.stack(a.tensors(), a.integer("axis")),
    "tile": _tile,
    "transpose": lambda a: a.tensor().permute(a.ints("perm")),
    "fill": _fill,
    "fill_like": _fill_like,
    "non_zero": lambda a: a.tensor().nonzero().to(TORCH_TYPES["int32"]),
    "one_hot": _one_hot,
    "range_1d": _range,
    "scatter": _scatter,
    "scatter_along_axis": _scatter_along_axis,
    "scatter_nd": _scatter_nd,
    "select": _select,
    "shape": lambda a: torch.tensor(a.tensor().shape, dtype=torch.int32),
}
