"""Attention and cache insertion, written out, compute what they did before, in operators that XNNPACK takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgeopt.exporter.executorch_attention import write_out_attention, write_out_insertions

LEAST = torch.finfo(torch.float32).min
BATCH, HEADS, ROWS, COLUMNS, WIDTH = 1, 2, 3, 5, 4


class Attention(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        result: Tensor = attend(query, key, value, attn_mask=mask, **self.options)  # type: ignore[arg-type]
        return result


class Masked(Attention):
    """With a mask made inside, from integers."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(query, key, value, torch.where(mask[:, None, None] == 0, LEAST, 0.0))


class Insertion(nn.Module):
    """A new row into a cache, at a position."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, row: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        here = (torch.arange(cache.shape[2]) == position).view(1, 1, -1, 1)
        return torch.where(here, self.project(row), cache)


class Guard(nn.Module):
    """Values choose: what is not chosen may be infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.sum(-1, keepdim=True) > 0, x.log(), 2 * x)


class HidesByPosition(nn.Module):
    """Integers choose, but one side is infinite."""

    def forward(self, scores: Tensor, position: Tensor) -> Tensor:
        return torch.where((torch.arange(COLUMNS) == position)[None], torch.full_like(scores, -math.inf), scores)


class GuardsRows(nn.Module):
    """Integers choose: rows behind the text see nothing, and their attention is no number."""

    def forward(self, scores: Tensor, value: Tensor, length: Tensor) -> Tensor:
        behind = (torch.arange(ROWS) >= length)[:, None]
        attended = torch.softmax(scores.masked_fill(behind, -math.inf), -1) @ value
        return torch.where(behind, torch.zeros_like(attended), attended)


class Inverse(nn.Module):
    """A row is put in whose making divides by a root."""

    def __init__(self, epsilon: float, exponent: float) -> None:
        super().__init__()
        self.epsilon, self.exponent = epsilon, exponent

    def forward(self, row: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        here = (torch.arange(cache.shape[1]) == position).view(1, -1, 1)
        square = row.pow(self.exponent).mean(-1, keepdim=True)
        return torch.where(here, row * torch.rsqrt(square + self.epsilon), cache)


class Chain(nn.Module):
    """Each step is read twice by the next one."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, row: Tensor, cache: Tensor, position: Tensor) -> Tensor:
        for _ in range(self.steps):
            row = row * 0.5 + row.neg() * 0.25
        return torch.where((torch.arange(cache.shape[1]) == position).view(1, -1, 1), row, cache)


def tensors(columns: int = COLUMNS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((BATCH, HEADS, ROWS, WIDTH), (BATCH, HEADS, columns, WIDTH), (BATCH, HEADS, columns, WIDTH))
    query, key, value = (3 * torch.randn(shape) for shape in shapes)
    return query, key, value


def operators(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    return torch.export.export(module.eval(), inputs)


def check(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    program = exported(module, inputs)
    write_out_insertions(program)
    write_out_attention(program)
    torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-5, atol=1e-6)
    return program


def written(program: ExportedProgram) -> bool:
    return "aten.scaled_dot_product_attention.default" not in operators(program)


@pytest.mark.parametrize("scale", [None, 1.0, 0.2])
def test_plain(scale: float | None) -> None:
    assert written(check(Attention(scale=scale), tensors()))


def test_a_finite_mask_is_added_and_nothing_else() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    program = check(Masked(), (*tensors(), mask))
    assert written(program)
    assert not {"aten.clamp.default", "aten.gt.Scalar"} & operators(program)


def test_a_row_that_sees_nothing_gives_zeros() -> None:
    seen = torch.ones(1, 1, ROWS, COLUMNS, dtype=torch.bool)
    seen[..., 1, :] = False
    seen[..., 0, 2:] = False
    for mask in (seen, torch.where(seen, 0.3, -math.inf)):
        program = check(Attention(), (*tensors(), mask))
        assert written(program)
        assert not program.module()(*tensors(), mask)[:, :, 1].any()


def test_causal() -> None:
    assert written(check(Attention(is_causal=True), tensors(ROWS)))


def test_shared_heads_stay_as_they_are() -> None:
    query, key, value = tensors()
    assert not written(check(Attention(enable_gqa=True), (query, key[:, :1], value[:, :1])))


def test_an_insertion_becomes_arithmetic_to_the_bit() -> None:
    module, torch_cache = Insertion(), torch.randn(1, HEADS, COLUMNS, WIDTH)
    inputs = (torch.randn(1, HEADS, 1, WIDTH), torch_cache, torch.tensor([3]))
    program = exported(module, inputs)
    write_out_insertions(program)
    assert "aten.where.self" not in operators(program)
    for position in (0, 4):
        given = (*inputs[:2], torch.tensor([position]))
        assert torch.equal(program.module()(*given), module(*given))


def test_what_values_choose_or_may_be_infinite_stays() -> None:
    guarded = check(Guard(), (torch.tensor([[1.0, 2.0], [-1.0, -2.0]]),))
    hidden = check(HidesByPosition(), (torch.randn(2, COLUMNS), torch.tensor([2])))
    assert "aten.where.self" in operators(guarded) & operators(hidden)


def test_rows_that_may_be_no_numbers_are_not_multiplied() -> None:
    inputs = (torch.randn(ROWS, COLUMNS), torch.randn(COLUMNS, WIDTH), torch.tensor(2))
    program = check(GuardsRows(), inputs)
    assert not program.module()(*inputs)[2].any()


def inserted(module: nn.Module, row: Tensor) -> bool:
    """Whether the module's insertion has become arithmetic."""
    program = check(module, (row, torch.randn(1, COLUMNS, WIDTH), torch.tensor([2])))
    return "aten.where.self" not in operators(program)


def test_roots_and_powers_are_finite_only_where_nothing_divides_by_zero() -> None:
    row = torch.randn(1, 1, WIDTH)
    assert inserted(Inverse(1e-6, 2), row)
    assert not inserted(Inverse(0.0, 2), row)
    assert not inserted(Inverse(1e-6, -2), row)


def test_looking_back_takes_each_step_once() -> None:
    """Regression: every reader of a step walked back through all steps before it, 2**400 ways here."""
    assert inserted(Chain(400), torch.randn(1, 1, WIDTH))


def test_masks_of_free_sizes_are_looked_through() -> None:
    """Regression: a size among an operator's inputs has no type, and looking at it raised."""
    query, key, value = tensors()
    mask = torch.ones(COLUMNS, dtype=torch.int64)

    class Shaped(Attention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            assert mask is not None
            hidden = torch.where(mask[None] == 0, LEAST, 0.0).expand(query.shape[2], -1)
            return super().forward(query, key, value, hidden)

    size = torch.export.Dim("size", min=2, max=64)
    program = torch.export.export(
        Shaped().eval(), (query, key, value, mask), dynamic_shapes=({2: size}, None, None, None)
    )
    write_out_attention(program)
    assert written(program)
