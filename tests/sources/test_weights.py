import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgeopt.errors import UsageError
from edgeopt.sources import SourceOptions, load_model
from edgeopt.sources.weights import load_weights


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {key: torch.rand_like(value.float()).to(value.dtype) for key, value in net().state_dict().items()}


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_reads_checkpoints_as_training_scripts_write_them(tmp_path: Path, key: str | None, prefix: str) -> None:
    saved = {prefix + name: value for name, value in state().items()}
    torch.save(saved if key is None else {"epoch": 3, key: saved}, tmp_path / "w.pt")
    module = net()
    load_weights(module, tmp_path / "w.pt")
    assert all(torch.equal(value, state()[name]) for name, value in module.state_dict().items())


def test_reads_safetensors(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    module = net()
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module.state_dict()["0.weight"], state()["0.weight"])


def test_batch_norms_counter_may_be_missing(tmp_path: Path) -> None:
    torch.save({key: value for key, value in state().items() if "num_batches" not in key}, tmp_path / "w.pt")
    load_weights(net(), tmp_path / "w.pt")


def test_names_the_keys_that_do_not_fit(tmp_path: Path) -> None:
    wrong = state() | {"extra": torch.zeros(1), "0.bias": torch.zeros(7)}
    del wrong["0.weight"]
    torch.save(wrong, tmp_path / "w.pth")
    with pytest.raises(UsageError) as caught:
        load_weights(net(), tmp_path / "w.pth")
    line = caught.value.line()
    assert "missing: 0.weight" in line
    assert "unexpected: extra" in line
    assert "other shape: 0.bias (7,) for (3,)" in line


class Payload:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (Path("executed"),)


def test_never_executes_a_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "w.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("w.pt", "plain.pt"):
        with pytest.raises(UsageError, match="save the state dict alone"):
            load_weights(net(), Path(name))
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 20, None])
def test_a_corrupt_file_is_a_clear_line(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is None:
        save_file(state(), path) if name.endswith("safetensors") else torch.save(state(), path)
        content = path.read_bytes()[:-50]
    path.write_bytes(content)
    with pytest.raises(UsageError, match="corrupt"):
        load_weights(net(), path)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such weights file"):
        load_weights(net(), tmp_path / "absent.pt")
    (tmp_path / "w.npz").touch()
    with pytest.raises(UsageError, match="give one of"):
        load_weights(net(), tmp_path / "w.npz")
    torch.save([1, 2], tmp_path / "w.pt")
    with pytest.raises(UsageError, match="holds no state dict"):
        load_weights(net(), tmp_path / "w.pt")


def test_weights_go_with_factories_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--weights goes with a Python factory"):
        load_model("net.onnx", SourceOptions(weights=tmp_path / "w.pt"))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_shared_tensors_may_be_written_once(tmp_path: Path) -> None:
    value = torch.arange(15.0).reshape(5, 3)
    save_file({"embedding.weight": value}, tmp_path / "w.safetensors")
    module = Tied()
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(module.head.weight, value)


def test_a_prefix_that_is_the_networks_own_stays(tmp_path: Path) -> None:
    module = torch.nn.Sequential(OrderedDict(module=net()))
    torch.save({f"module.{key}": value for key, value in state().items()}, tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    assert torch.equal(module.state_dict()["module.0.weight"], state()["0.weight"])
