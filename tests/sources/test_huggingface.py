import json
from pathlib import Path

import pytest
import torch

from edgeopt.errors import MissingError, UsageError
from edgeopt.sources import SourceOptions, load_model, parse_input
from edgeopt.sources.huggingface_preprocessing import preprocessing_for
from edgeopt.types import WRAPPED_ATTRIBUTE, AudioPreprocessing, ImagePreprocessing, TensorSpec, TextPreprocessing

transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "tiny-bert"
    names = {0: "bad", 1: "good"}
    config = transformers.BertConfig(
        **TINY, vocab_size=50, max_position_embeddings=48, id2label=names, label2id={v: k for k, v in names.items()}
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_classifier(bert: Path) -> None:
    model = load_model(f"hf:{bert}", SourceOptions())
    assert model.name == "tiny-bert"
    assert [spec.name for spec in model.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(spec.shape == (1, 48) and spec.dtype == "int64" for spec in model.inputs)
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("logits", (1, 2))]
    assert model.labels == ("bad", "good")
    assert model.preprocessing is None
    assert hasattr(model.module, WRAPPED_ATTRIBUTE)
    assert model.history[0].config["task"] == "text-classification"
    assert str(bert) not in str(model.history)
    tensors = tuple(torch.from_numpy(array) for array in model.example_inputs.values())
    program = torch.export.export(model.module, tensors).module(check_guards=False)
    assert torch.equal(program(*tensors), model.module(*tensors))


def test_the_mask_masks(bert: Path) -> None:
    model = load_model(f"hf:{bert}", SourceOptions())
    ids, mask, types = (torch.from_numpy(array).clone() for array in model.example_inputs.values())
    mask[:, 24:] = 0
    other = ids.clone()
    other[:, 24:] = 7
    assert torch.allclose(model.module(ids, mask, types), model.module(other, mask, types), atol=1e-6)


def test_dynamic_sequence_and_tokenizer(bert: Path, tmp_path: Path) -> None:
    folder = copy(bert, tmp_path / "net")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"model_input_names": ["input_ids", "attention_mask"]}')
    static = load_model(f"hf:{folder}", SourceOptions())
    assert [spec.name for spec in static.inputs] == ["input_ids", "attention_mask"]
    assert static.preprocessing == TextPreprocessing(str(folder / "tokenizer.json"), max_length=48)
    declared = tuple(parse_input(f"{name}=int64[batch:1..4,seq:2..32]") for name in ("input_ids", "attention_mask"))
    dynamic = load_model(f"hf:{folder}", SourceOptions(inputs=declared))
    assert dynamic.outputs[0].shape == (declared[0].shape[0], 2)
    assert dynamic.preprocessing == TextPreprocessing(str(folder / "tokenizer.json"), max_length=32, padding="none")


def test_weights_that_the_task_lacks_are_never_made_up(bert: Path) -> None:
    with pytest.raises(UsageError, match=r"no weights for .*qa_outputs") as caught:
        load_model(f"hf:{bert}", SourceOptions(task="question-answering"))
    assert "--task" in caught.value.line()


def test_a_missing_pooler_is_left_out(tmp_path: Path) -> None:
    transformers.BertForMaskedLM(transformers.BertConfig(**TINY, vocab_size=50)).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}", SourceOptions(task="feature-extraction"))
    assert [spec.name for spec in model.outputs] == ["last_hidden_state"]


def test_placeholder_labels_are_none(tmp_path: Path) -> None:
    config = transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=50, num_labels=3)
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}", SourceOptions())
    assert model.labels == ()
    assert [spec.name for spec in model.inputs] == ["input_ids", "attention_mask"]


def test_an_image_classifier(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**TINY, image_size=32, patch_size=8)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    settings = {
        "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model = load_model(f"hf:{tmp_path}", SourceOptions())
    assert [(spec.shape, spec.layout) for spec in model.inputs] == [((1, 3, 32, 32), "NCHW")]
    assert model.preprocessing == ImagePreprocessing(
        32, 32, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
    )


def test_the_encoder_of_an_encoder_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50)
    transformers.T5Model(config).save_pretrained(tmp_path)
    model = load_model(f"hf:{tmp_path}", SourceOptions())
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("last_hidden_state", (1, 128, 16))]


def image_settings(**settings: object) -> dict[str, object]:
    return settings | {"image_mean": [0.0], "image_std": [1.0]}


@pytest.mark.parametrize(
    ("settings", "shorter"),
    [
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}, 256),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 256),
        ({"size": {"shortest_edge": 384}, "crop_pct": 1.0}, 384),
        ({"size": {"height": 224, "width": 224}}, None),
        ({"size": 224}, None),
    ],
)
def test_how_pictures_are_cut(tmp_path: Path, settings: dict[str, object], shorter: int | None) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_settings(**settings)))
    found = preprocessing_for(tmp_path, (TensorSpec("pixel_values", (1, 3, 224, 224), "float32", "NCHW"),))
    assert isinstance(found, ImagePreprocessing)
    assert (found.height, found.width, found.resize_shorter, found.rescale) == (224, 224, shorter, 255.0)


def test_waveforms(tmp_path: Path) -> None:
    spec = (TensorSpec("input_values", (1, 8000), "float32"),)
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 8000, "do_normalize": false}')
    assert preprocessing_for(tmp_path, spec) == AudioPreprocessing(8000, 8000)
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 8000, "do_normalize": true}')
    assert preprocessing_for(tmp_path, spec) is None


def test_wrong_directories(bert: Path, tmp_path: Path) -> None:
    def line(change: str, folder: Path, options: SourceOptions | None = None) -> None:
        with pytest.raises(UsageError, match=change):
            load_model(f"hf:{folder}", options or SourceOptions())

    line("no config.json", tmp_path)
    line("no such directory", tmp_path / "absent")
    line("unknown task 'sing'", bert, SourceOptions(task="sing"))
    folder = copy(bert, tmp_path / "net")
    (folder / "model.safetensors").write_bytes(b"garbage")
    line("transformers can't load it", folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    line("no .safetensors weights", folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Net"}}')
    line("needs Python code of its own", folder)
    (folder / "config.json").write_text("{")
    line("is not JSON", folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    line("names no architecture", folder)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeopt.sources.huggingface.find_spec", lambda _: None)
    with pytest.raises(MissingError, match=r"pip install 'edgeopt\[hf\]'"):
        load_model("hf:some/model", SourceOptions())


def test_an_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")

    def offline(*_: object, **__: object) -> str:
        raise errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="hf download owner/name"):
        load_model("hf:owner/name", SourceOptions())
