import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeopt.errors import UsageError
from edgeopt.sources import SourceOptions, load_model, parse_input
from edgeopt.types import Dim


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.drop(self.conv(image).relu().mean((2, 3)))
        return {"logits": self.head(features), "flat": features.reshape(image.shape[0] * 4)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes={"image": {0: batch}})
    torch.export.save(program, path)
    return path


def test_signature_comes_from_the_program(saved: Path) -> None:
    model = load_model(str(saved), SourceOptions())
    (image,) = model.inputs
    assert (image.name, image.layout, image.shape[1:]) == ("image", "NCHW", (3, 8, 8))
    assert isinstance(image.shape[0], Dim)
    assert (image.shape[0].min, image.shape[0].max) == (1, 8)
    logits, flat = model.outputs
    assert (logits.name, logits.shape) == ("logits", (image.shape[0], 2))
    assert flat.shape == (Dim("flat_0", 4, 32),)
    model.module.eval()
    torch.export.export(model.module, (torch.from_numpy(model.example_inputs["image"]),))


def test_a_dynamic_dimension_can_be_fixed(saved: Path) -> None:
    model = load_model(str(saved), SourceOptions(inputs=(parse_input("image=float32[1,3,8,8]"),)))
    assert [spec.shape for spec in model.outputs] == [(1, 2), (4,)]
    with pytest.raises(UsageError, match="has no input 'x'; its inputs are image"):
        load_model(str(saved), SourceOptions(inputs=(parse_input("x=float32[1,3,8,8]"),)))


def test_layers_survive_tracing_again(saved: Path) -> None:
    model = load_model(str(saved), SourceOptions())
    program = torch.export.export(model.module, (torch.from_numpy(model.example_inputs["image"]),))
    layers = {
        str(node.target): list(node.meta["nn_module_stack"].values())[-1][0]
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    assert layers["aten.conv2d.default"] == "conv"
    assert layers["aten.linear.default"] == "head"


def test_layers_survive_tracing_inside_another_module(saved: Path) -> None:
    # Regression: the LiteRT exporter puts its adapter around the model, and all operators were the root's.
    model = load_model(str(saved), SourceOptions())

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.module

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.inner(image.permute(0, 3, 1, 2))

    image = torch.from_numpy(model.example_inputs["image"]).permute(0, 2, 3, 1)
    program = torch.export.export(Adapter().eval(), (image,))
    layers = {
        str(node.target): list(node.meta["nn_module_stack"].values())[-1][0].split(".")[-1]
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    assert (layers["aten.conv2d.default"], layers["aten.linear.default"]) == ("conv", "head")


def test_nested_and_keyword_inputs_come_by_position(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor], *, scale: torch.Tensor) -> dict[str, object]:
            return {"sum": (pair[0] + pair[1]) * scale, "none": None, "pair": [pair[1] - 1, pair[0] + 1]}

    example = ((torch.zeros(2), torch.ones(2)),), {"scale": torch.full((2,), 3.0)}
    torch.export.save(torch.export.export(Pair(), *example), tmp_path / "pair.pt2")
    model = load_model(str(tmp_path / "pair.pt2"), SourceOptions())
    assert [spec.name for spec in model.outputs] == ["sum", "pair_0", "pair_1"]
    results = model.module(*(torch.from_numpy(model.example_inputs[spec.name]) for spec in model.inputs))
    assert [r.tolist() for r in results] == [[3.0, 3.0], [0.0, 0.0], [1.0, 1.0]]


def test_training_mode_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Net().train(), (torch.randn(2, 3, 8, 8),)), tmp_path / "net.pt2")
    with pytest.raises(UsageError, match=r"training mode \(operator aten.dropout"):
        load_model(str(tmp_path / "net.pt2"), SourceOptions())


def tampered(saved: Path, target: Path, member: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A copy with one member replaced, or added where it isn't there."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        full = f"{names[0].partition('/')[0]}/{member}"
        for name in [*names, *([] if full in names else [full])]:
            content = old.read(name) if name in names else b""
            replacement = change(content) if name == full else content
            if replacement is not None:
                new.writestr(name, replacement)
    return target


def edited(*path: str | int, value: object) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        program = json.loads(content)
        spot = program
        for key in path[:-1]:
            spot = spot[key]
        spot[path[-1]] = value
        return json.dumps(program).encode()

    return edit


def always(content: bytes | None) -> Callable[[bytes], bytes | None]:
    return lambda _: content


GRAPH = ("graph_module", "graph")
EVIL = "__import__('pathlib').Path('executed').touch()"


@pytest.mark.parametrize(
    ("member", "change", "problem"),
    [
        ("models/model.json", edited(*GRAPH, "nodes", 0, "target", value="torch.hub.load"), "torch.hub.load"),
        ("models/model.json", edited(*GRAPH, "nodes", 0, "target", value="_operator.methodcaller"), "methodcaller"),
        ("models/model.json", edited(*GRAPH, "nodes", 0, "target", value="torch.ops.aten.from_file"), "from_file"),
        ("models/model.json", edited(*GRAPH, "nodes", 0, "target", value="torch.ops.mine.op"), "torch.ops.mine.op"),
        ("models/model.json", edited(*GRAPH, "inputs", 0, "as_tensor", "name", value=f"x={EVIL}"), "holds the name"),
        (
            "models/model.json",
            edited(*GRAPH, "tensor_values", "image", "sizes", 0, value={"as_expr": {"expr_str": EVIL, "hint": None}}),
            "holds the expression",
        ),
        (
            "models/model.json",
            edited("graph_module", "module_call_graph", 0, "signature", "in_spec",
                   value='[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'),
            "collections.defaultdict",
        ),
        ("data/weights/model_weights_config.json", edited("config", "head.bias", "use_pickle", value=True), "pickled"),
        ("data/weights/model.pt", always(b"x"), "pickled"),
        ("data/constants/custom_obj_0", always(b"x"), "pickled"),
        ("data/aotinductor/model/model.so", always(b"x"), "compiled code"),
        ("data/sample_inputs/model.pt", always(b"x"), "not tensors"),
        ("../model.json", always(b"x"), "unexpected member"),
        ("MODELS/model.json", always(b"{}"), "unexpected member"),
        ("models/model.json", always(None), "no exported program"),
        ("models/model.json", lambda content: content[:-10], "no readable exported program"),
    ],
)  # fmt: skip
def test_nothing_in_a_file_is_executed(
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    member: str,
    change: Callable[[bytes], bytes | None],
    problem: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tampered(saved, tmp_path / "net.pt2", member, change)
    with pytest.raises(UsageError, match=problem) as caught:
        load_model(str(path), SourceOptions())
    assert "\n" not in caught.value.line()
    assert not Path("executed").exists()


def test_a_pickle_in_the_sample_inputs_is_not_loaded(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (Path("executed"),)

    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    torch.save(((Payload(),), {}), stream)
    path = tampered(saved, tmp_path / "net.pt2", "data/sample_inputs/model.pt", always(stream.getvalue()))
    with pytest.raises(UsageError, match="objects that are not tensors"):
        load_model(str(path), SourceOptions())
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_corrupt_file_is_a_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(UsageError, match="no readable exported program"):
        load_model(str(tmp_path / "net.pt2"), SourceOptions())
