"""Networks of another shape than their factory's: described, written, and rebuilt bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from edgeopt.errors import ConversionError, UsageError
from edgeopt.json_data import dumps
from edgeopt.sources.adapter import adapt
from edgeopt.sources.structure import (
    METADATA_KEY,
    PassThrough,
    Structure,
    describe,
    load_model,
    parse,
    restructure,
    save_model,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return result


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.blocks(self.stem(x)))
        result: Tensor = self.head(self.norm(x.mean((2, 3))))
        return result


class Tied(nn.Module):
    """The embedding is the output layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.between = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.between(self.embedding(tokens)))
        return result


class Attention(nn.Module):
    """Returns its weights beside the result, as attention blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.sizes = 4, [2, 2, 2, 2]
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
        heads = torch.cat([part.softmax(-1) for part in self.project(x).split(self.sizes, -1)], -1)
        return heads * scale, heads


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(3)])
        self.extra: nn.Module | None = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, scale=0.5)[0]
        return x if self.extra is None else self.extra(x)


PICTURE = torch.linspace(-1, 1, 2 * 3 * 12 * 12).reshape(2, 3, 12, 12)
TOKENS = torch.arange(10).reshape(2, 5)
VECTORS = torch.linspace(-1, 1, 24).reshape(3, 8)


def fresh(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    network = kind().eval()
    for name, value in network.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2)
        elif "norm" in name and value.is_floating_point():
            value.normal_()
    return network


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def pruned(network: ResNet) -> ResNet:
    """Every kind of layer narrower, in all that says so."""
    first = network.blocks[0]
    assert isinstance(first, Block)
    first.conv1.weight, first.conv1.out_channels = parameter(5, 8, 3, 3), 5
    first.norm1.weight, first.norm1.bias, first.norm1.num_features = parameter(5), parameter(5), 5
    first.norm1.running_mean, first.norm1.running_var = torch.randn(5), torch.rand(5) + 0.5
    first.conv2.weight, first.conv2.in_channels = parameter(8, 5, 3, 3), 5
    network.depthwise.weight = parameter(4, 1, 3, 3)
    network.depthwise.groups = network.depthwise.in_channels = network.depthwise.out_channels = 4
    for conv in (network.blocks[1].conv2, network.blocks[2].conv2, first.conv2):
        conv.weight = nn.Parameter(conv.weight[:4].clone())
        conv.out_channels = 4
    for block in network.blocks:
        assert isinstance(block, Block)
        block.norm2 = nn.BatchNorm2d(4).eval()
        if block is not first:
            block.conv1.weight, block.conv1.in_channels = nn.Parameter(block.conv1.weight[:, :4].clone()), 4
    network.stem.weight, network.stem.bias, network.stem.out_channels = parameter(4, 3, 3, 3), parameter(4), 4
    first.conv1.weight, first.conv1.in_channels = nn.Parameter(first.conv1.weight[:, :4].clone()), 4
    network.norm.weight, network.norm.bias, network.norm.normalized_shape = parameter(4), parameter(4), (4,)
    network.head.weight, network.head.in_features = parameter(5, 4), 4
    return network


def without_block(network: ResNet) -> ResNet:
    network.blocks[1] = PassThrough()
    return network


def factorized(network: ResNet) -> ResNet:
    network.blocks[0].conv1 = nn.Sequential(
        nn.Conv2d(8, 3, (3, 1), padding=(1, 0), bias=False), nn.Conv2d(3, 8, (1, 3), padding=(0, 1))
    )
    network.blocks[2].norm1 = nn.Identity()
    network.head = nn.Sequential(nn.Linear(8, 2, bias=False), nn.Linear(2, 5))
    return network


def shortened(network: ResNet) -> ResNet:
    del network.blocks[0]
    return network


def with_bias(network: ResNet) -> ResNet:
    network.depthwise.bias, network.head.bias = parameter(8), None
    return network


CHANGES = [pruned, without_block, factorized, shortened, with_bias]


def check_round_trip(kind: Callable[[], nn.Module], changed: nn.Module, value: Tensor, path: Path) -> nn.Module:
    wanted = changed(value)
    structure = describe(fresh(kind), changed)
    assert parse(dumps(structure), "x") == structure
    rebuilt = fresh(kind, 1)
    restructure(rebuilt, structure)
    rebuilt.load_state_dict(changed.state_dict())
    assert torch.equal(rebuilt(value), wanted)
    assert describe(changed, rebuilt).is_empty
    save_model(changed, fresh(kind, 2), path)
    loaded = load_model(fresh(kind, 3), path)
    assert torch.equal(loaded(value), wanted)
    return loaded


@pytest.mark.parametrize("change", CHANGES)
def test_round_trip_gives_the_same_function_bit_for_bit(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    check_round_trip(ResNet, change(fresh(ResNet)), PICTURE, tmp_path / "w.safetensors")


def test_changes_of_changes_too(tmp_path: Path) -> None:
    network = fresh(ResNet)
    assert isinstance(network, ResNet)
    check_round_trip(ResNet, factorized(without_block(network)), PICTURE, tmp_path / "w.safetensors")


def test_unchanged_network_needs_no_structure(tmp_path: Path) -> None:
    save_model(fresh(ResNet), fresh(ResNet, 1), tmp_path / "w.safetensors")
    assert METADATA_KEY.encode() not in (tmp_path / "w.safetensors").read_bytes()
    assert torch.equal(load_model(fresh(ResNet, 1), tmp_path / "w.safetensors")(PICTURE), fresh(ResNet)(PICTURE))
    # In the source's adapter, too.
    adapted = adapt(fresh(ResNet, 1), ["x"], None)
    assert torch.equal(load_model(adapted, tmp_path / "w.safetensors")(PICTURE), fresh(ResNet)(PICTURE))


def test_tied_tensors_stay_tied_at_their_new_shape(tmp_path: Path) -> None:
    network = fresh(Tied)
    assert isinstance(network, Tied)
    network.embedding.weight = network.head.weight = parameter(11, 4)
    network.between = nn.Linear(4, 4)
    network.embedding.embedding_dim = network.head.in_features = 4
    loaded = check_round_trip(Tied, network, TOKENS, tmp_path / "w.safetensors")
    assert loaded.get_parameter("embedding.weight") is loaded.get_parameter("head.weight")
    assert len([tensor for tensor in loaded.parameters() if tensor.shape == (11, 4)]) == 1


def test_tied_tensors_of_the_old_shape_are_written_once(tmp_path: Path) -> None:
    network = fresh(Tied)
    assert isinstance(network, Tied)
    network.between = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 6))
    loaded = check_round_trip(Tied, network, TOKENS, tmp_path / "w.safetensors")
    assert loaded.get_parameter("embedding.weight") is loaded.get_parameter("head.weight")


def test_untied_tensors_are_told_apart(tmp_path: Path) -> None:
    network = fresh(Tied)
    assert isinstance(network, Tied)
    network.head.weight = nn.Parameter(network.head.weight.detach() * 2)
    loaded = check_round_trip(Tied, network, TOKENS, tmp_path / "w.safetensors")
    assert loaded.get_parameter("embedding.weight") is not loaded.get_parameter("head.weight")


def test_a_block_that_returns_a_tuple_is_passed_through(tmp_path: Path) -> None:
    network = fresh(Encoder)
    assert isinstance(network, Encoder)
    network.layers[1] = PassThrough(2)
    network.extra = None
    check_round_trip(Encoder, network, VECTORS, tmp_path / "w.safetensors")
    assert PassThrough(3)(VECTORS) == (VECTORS, None, None)
    assert PassThrough(3, (1, -1))(VECTORS, TOKENS) == (VECTORS, TOKENS, None)
    assert PassThrough()(hidden_states=VECTORS) is VECTORS


def test_lists_of_sizes_and_shortened_lists_follow(tmp_path: Path) -> None:
    network = fresh(Encoder)
    assert isinstance(network, Encoder)
    del network.layers[2]
    last = network.layers[1]
    assert isinstance(last, Attention)
    last.num_heads, last.sizes = 2, [4, 4]
    loaded = check_round_trip(Encoder, network, VECTORS, tmp_path / "w.safetensors")
    assert loaded.get_submodule("layers.1").sizes == [4, 4]


def test_shared_layers_stay_shared(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(self.first(x))
            return result

    network = fresh(Twice)
    assert isinstance(network, Twice)
    network.first = network.second = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    loaded = check_round_trip(Twice, network, VECTORS, tmp_path / "w.safetensors")
    assert loaded.get_submodule("first") is loaded.get_submodule("second")


def test_double_precision_survives(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 4))).double().eval()
    check_round_trip(
        lambda: nn.Sequential(nn.Linear(8, 4)).double(), network, VECTORS.double(), tmp_path / "w.safetensors"
    )


def test_paths_are_those_of_the_users_module(tmp_path: Path) -> None:
    network = fresh(ResNet)
    assert isinstance(network, ResNet)
    changed, original = adapt(pruned(network), ["x"], None), adapt(fresh(ResNet, 1), ["x"], None)
    structure = describe(original, changed)
    assert {edit.path for edit in structure.attributes} >= {"stem", "blocks.0.conv1", "head"}
    save_model(changed, original, tmp_path / "w.safetensors")
    assert torch.equal(load_model(fresh(ResNet, 2), tmp_path / "w.safetensors")(PICTURE), changed(PICTURE))
    other = adapt(fresh(ResNet, 2), ["x"], None)
    assert torch.equal(load_model(other, tmp_path / "w.safetensors")(PICTURE), changed(PICTURE))


def test_describing_changes_neither(tmp_path: Path) -> None:
    network, original = factorized(fresh(ResNet)), fresh(ResNet)
    before = [copy.deepcopy(one.state_dict()) for one in (network, original)]
    save_model(network, original, tmp_path / "w.safetensors")
    for one, state in zip((network, original), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def test_same_network_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(1)
        save_model(pruned(fresh(ResNet)), fresh(ResNet), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written"):
        save_model(fresh(ResNet), fresh(ResNet), tmp_path / "file" / "w.safetensors")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(UsageError, match="No space left"):
        save_model(fresh(ResNet), fresh(ResNet), tmp_path / "w.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- what can't be described -----------------------------------------------------------------------------------------


def activation(network: ResNet) -> None:
    network.head = nn.GELU()


def mode(network: ResNet) -> None:
    network.stem.padding_mode = "circular"


def added(network: ResNet) -> None:
    network.blocks.append(nn.Linear(2, 2))


def new_attribute(network: ResNet) -> None:
    network.head.flavour = 3


def named(network: ResNet) -> None:
    network.head = nn.Sequential()
    network.head.add_module("only", nn.Linear(8, 5))


def shared(network: ResNet) -> None:
    network.blocks[1] = network.blocks[0]


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (activation, "head"), (mode, "stem"), (added, "blocks.3"), (new_attribute, "head"), (named, "head"),
        (shared, "blocks.1"),
    ],
)  # fmt: skip
def test_names_the_layer_that_cannot_be_described(change: Callable[[ResNet], None], layer: str) -> None:
    network = fresh(ResNet)
    assert isinstance(network, ResNet)
    change(network)
    with pytest.raises(ConversionError) as caught:
        describe(fresh(ResNet), network)
    assert f"layer '{layer}'" in caught.value.line()


def test_a_buffer_that_state_dicts_leave_out_must_stay() -> None:
    class Mask(nn.Module):
        def __init__(self, size: int = 4) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(size), persistent=False)

    assert describe(Mask(), Mask()).is_empty
    with pytest.raises(ConversionError, match="'mask'"):
        describe(Mask(), Mask(3))


def test_a_replacement_that_shares_tensors_with_the_rest() -> None:
    network = fresh(Tied)
    assert isinstance(network, Tied)
    inner = nn.Linear(6, 11, bias=False)
    inner.weight = network.embedding.weight
    network.head = nn.Sequential(inner)
    with pytest.raises(ConversionError, match="shares tensors"):
        describe(fresh(Tied), network)


# --- files from strangers --------------------------------------------------------------------------------------------


def attribute(path: str, name: str, value: object) -> dict[str, object]:
    return {"attributes": [{"path": path, "name": name, "value": value}]}


def tensor(*names: str, shape: list[int], dtype: str = "float32") -> dict[str, object]:
    return {"tensors": [{"names": names, "shape": shape, "dtype": dtype}]}


def layer(kind: str, path: str = "head", **arguments: object) -> dict[str, object]:
    spec = {"kind": kind, "arguments": arguments, "dtype": "float32"}
    return {"replaced": [{"paths": [path], "layers": [spec], "is_sequential": False}]}


LINEAR = {"in_features": 8, "out_features": 5, "bias": True}
HOSTILE: list[tuple[object, str]] = [
    ("no object", "valid"),
    ("[" * 100_000, "JSON"),
    ({"other": 1}, "'other'"),
    (layer("Bilinear", in_features=8), "Input should be 'Linear'"),
    (layer("eval", path="head"), "Input should be 'Linear'"),
    (layer("Linear", **LINEAR, device="cuda"), "takes in_features"),
    (layer("Linear", **LINEAR | {"out_features": 10**13}), "other shape: head.weight"),
    (layer("Linear", **LINEAR | {"out_features": 10**30}), "can't be built"),
    (layer("Linear", **LINEAR | {"out_features": -1}), "below 1"),
    (layer("Linear", path="", **LINEAR), "no such layer"),
    (layer("Linear", path="head.weight", **LINEAR), "no such layer"),
    (layer("PassThrough", length=10**9, handed=[]), "returns 1 to"),
    (layer("PassThrough", length=3, handed=[0]), "are handed on"),
    ({"replaced": [{"paths": ["head"], "layers": [], "is_sequential": False}]}, "one layer"),
    ({"removed": ["nowhere"]}, "layer 'nowhere'"),
    ({"removed": ["forward"]}, "layer 'forward'"),
    (attribute("stem", "_parameters", [1]), "no such attribute"),
    (attribute("stem", "__class__", 1), "no such attribute"),
    (attribute("stem", "forward", 1), "no such attribute"),
    (attribute("stem", "kernel_size", 3), "no such attribute"),
    (attribute("stem", "padding_mode", "zeros"), "attributes"),
    (attribute("__class__", "x", 1), "layer '__class__'"),
    (tensor("head.weight", shape=[10**12, 8]), "tensor 'head.weight'"),
    (tensor("head.weight", shape=[10**30, 8]), "can't have the shape"),
    (tensor("head.weight", shape=[-1, 8]), "can't have the shape"),
    (tensor("head.weight", shape=[5, 8], dtype="complex64"), "dtype"),
    (tensor("blocks.0.norm1.num_batches_tracked", shape=[10**12]), "num_batches_tracked"),
    (tensor("head.nothing", shape=[5, 8]), "no such tensor"),
    ({"tensors": [{"names": ["head.weight"], "shape": None, "dtype": None}]}, "unexpected: head.weight"),
    (tensor(shape=[5, 8]), "a tensor without a name"),
    ({"replaced": [{"paths": [], "layers": [], "is_sequential": True}]}, "a replacement without a place"),
]


@pytest.mark.parametrize(("structure", "message"), HOSTILE)
def test_hostile_metadata_is_one_line_and_leaves_the_network_alone(
    structure: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.safetensors"
    network = fresh(ResNet)
    state = {key: value for key, value in network.state_dict().items() if "num_batches" not in key}
    save_file(state, path, {METADATA_KEY: structure if isinstance(structure, str) else json.dumps(structure)})
    victim = fresh(ResNet, 1)
    wanted, keys, text = victim(PICTURE), list(victim.state_dict()), repr(victim)
    identities = [id(one) for one in (*victim.modules(), *victim.parameters(), *victim.buffers())]
    with pytest.raises(UsageError) as caught:
        load_model(victim, path)
    assert str(path) in caught.value.line()
    assert message in caught.value.line()
    assert torch.equal(victim(PICTURE), wanted)
    assert (list(victim.state_dict()), repr(victim)) == (keys, text)
    assert [id(one) for one in (*victim.modules(), *victim.parameters(), *victim.buffers())] == identities


def test_structure_of_another_network(tmp_path: Path) -> None:
    save_model(factorized(fresh(ResNet)), fresh(ResNet), tmp_path / "w.safetensors")
    with pytest.raises(UsageError) as caught:
        load_model(fresh(Tied), tmp_path / "w.safetensors")
    assert "was made from another network than Tied" in caught.value.line()


def test_restructure_leaves_the_network_alone_where_it_fails() -> None:
    network = fresh(ResNet)
    text = repr(network)
    with pytest.raises(UsageError, match="nowhere"):
        restructure(network, Structure(removed=("head", "nowhere")))
    assert repr(network) == text
