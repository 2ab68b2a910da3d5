"""Looking through a .pt2 archive before torch opens it.

`torch.export.load` trusts its file: it unpickles custom objects and falls back to full unpickling, evaluates symbolic
expressions (sympy's `sympify`), resolves operator names to any attribute of `torch`, writes names into Python source
that it executes, and loads AOTInductor's shared libraries. A graph of ATen operators with tensor weights, which is
all that a target can take, needs none of these; everything else is refused here. Serialization as of torch 2.13
(torch/export/pt2_archive, torch/_export/serde).
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeopt.errors import UsageError

#: Operators a graph may call: kernels without effects outside their tensors, and arithmetic on sizes. Python's own
#: `operator` also has call, attrgetter and methodcaller, so its functions are listed.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim|quantized_decomposed|torchao|torchvision|higher_order)\.\w+(\.\w+)?"
    r"|torch\.sym_(int|float|max|min|not|ite|sum|sqrt)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|getitem)"
    r"|math\.(ceil|floor|trunc|sqrt)"
)
#: ATen's exception: it opens a file, and may create it.
_FILE_OPERATOR = "torch.ops.aten.from_file"

#: Names end up in generated source.
_NAME = re.compile(r"[\w.:\- ]*")

#: Keys whose strings torch only prints, or quotes when it generates code.
_FREE_TEXT = frozenset({"metadata", "stack_trace", "as_string", "guards_code", "torch_version", "verifiers"})

_CONTAINERS = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})

#: Largest graph description that is read, in bytes; weights are not part of it.
_MAX_JSON = 1 << 30


def check_archive(path: Path) -> None:
    """Raises UsageError unless the file is an archive that torch can load without executing anything from it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            for name in members:
                _check_member(archive, members, name, path)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RecursionError, NotImplementedError) as error:
        raise UsageError(
            f"is no readable exported program ({error})",
            where=str(path),
            fix="write it with torch.export.save of torch 2.8 or newer",
        ) from error


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    """Name below the archive's one folder -> full name. Two readers must not see two different files."""
    members: dict[str, str] = {}
    roots: set[str] = set()
    seen: set[str] = set()
    for name in archive.namelist():
        root, separator, rest = name.partition("/")
        if not separator or ".." in rest.split("/") or "\\" in name or name.casefold() in seen:
            raise UsageError(
                f"has the unexpected member {name!r}", where=str(path), fix="write it with torch.export.save again"
            )
        roots.add(root)
        seen.add(name.casefold())
        members[rest] = name
    if len(roots) != 1 or "models/model.json" not in members:
        raise UsageError(
            "holds no exported program named 'model'", where=str(path), fix="write it with torch.export.save"
        )
    return members


def _check_member(archive: zipfile.ZipFile, members: Mapping[str, str], name: str, path: Path) -> None:
    full = members[name]
    if name.startswith(("data/aotinductor/", "data/executorch/", "data/mtia")):
        raise _refuse("compiled code", name, path)
    if name.startswith(("data/weights/", "data/constants/")):
        if name.endswith(".pt") or name.rpartition("/")[2].startswith(("custom_obj_", "opaque_obj_")):
            raise _refuse("pickled objects", name, path)
        if name.endswith(".json"):
            _check_payloads(_json(archive, full), name, path)
    elif name.startswith("data/sample_inputs/"):
        _check_sample_inputs(archive.read(full), name, path)
    elif name.startswith("models/"):
        _check_program(_json(archive, full), name, path)


def _json(archive: zipfile.ZipFile, name: str) -> object:
    if archive.getinfo(name).file_size > _MAX_JSON:
        raise ValueError(f"{name} is too large")
    content: object = json.loads(archive.read(name))
    return content


def _refuse(what: str, member: str, path: Path) -> UsageError:
    return UsageError(
        f"{member} holds {what}, and edgeopt runs no code from model files",
        where=str(path),
        fix="export the plain model with torch.export.export and torch.export.save",
    )


def _check_payloads(config: object, member: str, path: Path) -> None:
    for key, value in _walk(config):
        if key == "use_pickle" and value is not False:
            raise _refuse("pickled objects", member, path)
        if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
            raise _refuse(f"the entry {value!r}", member, path)


def _check_sample_inputs(content: bytes, member: str, path: Path) -> None:
    import torch

    if not content:
        return
    try:
        torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise _refuse("objects that are not tensors", member, path) from error


def _check_program(program: object, member: str, path: Path) -> None:
    for key, value in _walk(program):
        if key in ("target", "as_operator"):
            _check_operator(value, path)
        elif key == "expr_str":
            _check_expression(value, member, path)
        elif key in ("in_spec", "out_spec"):
            _check_tree(value, member, path)
        elif key == "as_custom_obj":
            raise _refuse("custom objects", member, path)
        elif isinstance(value, str) and not _NAME.fullmatch(value):
            raise _refuse(f"the name {value[:40]!r}", member, path)


def _walk(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Every (key, scalar) below a JSON value, and every key as a scalar; free text and its keys left out."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield "", name
            if name == "expr_str" or name not in _FREE_TEXT:
                yield from _walk(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, key)
    else:
        yield key, value


def _check_operator(target: object, path: Path) -> None:
    text = str(target)
    if _OPERATOR.fullmatch(text) is None or text.startswith(_FILE_OPERATOR):
        raise UsageError(
            f"calls {text[:80]!r}, which is not one of PyTorch's own operators",
            where=str(path),
            fix="export the model without custom operators",
        )


def _check_expression(expression: object, member: str, path: Path) -> None:
    """sympify evaluates this as Python: only constructor calls on names and numbers may be in it."""
    try:
        tree = ast.parse(str(expression), mode="eval")
    except SyntaxError as error:
        raise _refuse(f"the expression {str(expression)[:40]!r}", member, path) from error
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name[:1].isupper():
                continue
            case ast.Constant(value=str(text)) if re.fullmatch(r"\w+", text):
                continue
            case ast.Constant(value=int() | float()):
                continue
            case ast.Expression() | ast.Name() | ast.keyword() | ast.expr_context():
                continue
            case ast.BinOp() | ast.UnaryOp() | ast.operator() | ast.unaryop() | ast.Compare() | ast.cmpop():
                continue
            case _:
                raise _refuse(f"the expression {str(expression)[:40]!r}", member, path)


def _check_tree(text: object, member: str, path: Path) -> None:
    """How inputs and outputs nest; other containers than these make torch import modules by name."""
    if text is None:
        return
    if not isinstance(text, str):
        raise _refuse("a malformed signature", member, path)
    for key, value in _walk(json.loads(text)):
        is_known = value is None or value in _CONTAINERS or str(value).startswith("transformers.modeling_outputs.")
        if key == "type" and not is_known:
            raise UsageError(
                f"takes or returns a {value}", where=str(path), fix="export a model that uses tuples, lists and dicts"
            )
        if key == "context" and "__enum__" in str(value):
            raise _refuse("an enumeration", member, path)
