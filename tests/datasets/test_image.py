"""Pictures become pixels exactly as declared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeopt.datasets import Preprocessor, open_dataset, resolve_preprocessing
from edgeopt.errors import ConfigError, DataError, UsageError
from edgeopt.types import Dim, ImagePreprocessing, TensorSpec

IMAGENET = Path(__file__).parents[2].parent / "shared" / "data" / "imagenet_one_per_class"
LITE0 = ImagePreprocessing(
    224, 224, crop_fraction=0.875, interpolation="bicubic", rescale=1.0, mean=(127,) * 3, std=(128,) * 3
)


def spec(height: int, width: int, channels: int = 3) -> tuple[TensorSpec, ...]:
    return (TensorSpec("image", (Dim("batch"), channels, height, width), "float32", "NCHW"),)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.skipif(not IMAGENET.is_dir(), reason=f"{IMAGENET} is not here")
def test_efficientnet_lite_preprocessing_matches_pillow_on_real_pictures() -> None:
    dataset = open_dataset(str(IMAGENET), spec(224, 224), LITE0)
    assert len(dataset) == 1000
    assert not dataset.is_labelled
    for index in (0, 499, 999):
        sample = dataset[index]
        with Image.open(IMAGENET / sample.name) as file:
            rgb = file.convert("RGB")
        side = int(0.875 * min(rgb.size))
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        box = (round(left), round(top), round(left) + side, round(top) + side)
        pixels = np.asarray(rgb.crop(box).resize((224, 224), Image.Resampling.BICUBIC), np.float32)
        np.testing.assert_array_equal(sample.inputs["image"], ((pixels - 127) / 128).transpose(2, 0, 1)[None])


def test_crop_happens_before_resizing() -> None:
    canvas = Image.new("RGB", (80, 40), "black")
    canvas.paste("white", (30, 10, 50, 30))
    half = ImagePreprocessing(20, 20, crop_fraction=0.5)
    pixels = Preprocessor(half, spec(20, 20))(canvas, "canvas")["image"]
    assert pixels.min() == 1.0


def test_resize_shorter_keeps_the_aspect_and_cuts_the_centre() -> None:
    source = picture(60, 91)
    shorter = ImagePreprocessing(28, 28, resize_shorter=32, mean=(0.5,), std=(0.25,))
    got = Preprocessor(shorter, spec(28, 28))(source, "p")["image"]
    resized = source.resize((int(32 * 91 / 60), 32), Image.Resampling.BILINEAR)
    left = round((resized.width - 28) / 2)
    expected = np.asarray(resized.crop((left, 2, left + 28, 30)), np.float32) / 255
    np.testing.assert_allclose(got[0], ((expected - 0.5) / 0.25).transpose(2, 0, 1), rtol=1e-6)


def test_mean_and_std_apply_per_channel_in_both_layouts() -> None:
    source = Image.new("RGB", (4, 4), (10, 20, 30))
    nchw = ImagePreprocessing(4, 4, rescale=1, mean=(10, 10, 10), std=(1, 2, 4))
    nhwc = ImagePreprocessing(4, 4, rescale=1, mean=(10, 10, 10), std=(1, 2, 4), layout="NHWC")
    assert Preprocessor(nchw, spec(4, 4))(source, "p")["image"][0, :, 0, 0].tolist() == [0, 5, 5]
    last = (TensorSpec("image", (1, 4, 4, 3), "float32", "NHWC"),)
    assert Preprocessor(nhwc, last)(source, "p")["image"][0, 0, 0].tolist() == [0, 5, 5]


def test_a_layout_that_does_not_fit_the_model_is_named() -> None:
    nhwc = ImagePreprocessing(4, 4, layout="NHWC")
    with pytest.raises(DataError, match=r"p, input 'image': has shape \(1, 4, 4, 3\), the model takes \(batch, 3"):
        Preprocessor(nhwc, spec(4, 4))(picture(4, 4), "p")


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    picture(9, 7).save(tmp_path / f"a.{suffix}")
    assert open_dataset(str(tmp_path), spec(5, 5), None)[0].inputs["image"].shape == (1, 3, 5, 5)


def test_exif_orientation_turns_the_picture_upright(tmp_path: Path) -> None:
    stored = Image.new("RGB", (40, 20), "black")
    stored.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # Turn by 90 degrees clockwise: the left half comes on top.
    stored.save(tmp_path / "phone.png", exif=exif)
    pixels = open_dataset(str(tmp_path), spec(40, 20), None)[0].inputs["image"][0, 0]
    assert pixels[:20].min() == 1.0
    assert pixels[20:].max() == 0.0


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    """Pillow's own conversion turns every value above 255 white."""
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    grey = ImagePreprocessing(4, 4, channels=1, rescale=1)
    assert Preprocessor(grey, spec(4, 4, 1))(deep, "p")["image"].max() == 128
    rgb = ImagePreprocessing(4, 4, rescale=1)
    assert Preprocessor(rgb, spec(4, 4))(deep, "p")["image"].max() == 128


def test_grey_palette_and_alpha_pictures_become_rgb() -> None:
    rgb = Preprocessor(ImagePreprocessing(4, 4), spec(4, 4))
    for mode in ("L", "P", "RGBA", "LA", "CMYK", "1"):
        assert rgb(Image.new(mode, (6, 6)), mode)["image"].shape == (1, 3, 4, 4)


def test_byte_arrays_are_pictures_and_floats_are_ready() -> None:
    prepare = Preprocessor(ImagePreprocessing(4, 4, rescale=1), spec(4, 4))
    assert prepare(np.full((8, 8, 3), 7, np.uint8), "p")["image"].tolist() == np.full((1, 3, 4, 4), 7).tolist()
    assert prepare(np.full((8, 8), 7, np.uint8), "p")["image"].max() == 7
    ready = np.random.default_rng(0).normal(size=(3, 4, 4))
    np.testing.assert_array_equal(prepare(ready, "p")["image"], ready[None].astype(np.float32))


def test_the_callers_picture_is_left_alone() -> None:
    mine = picture(8, 8)
    Preprocessor(ImagePreprocessing(4, 4), spec(4, 4))(mine, "p")
    assert mine.getpixel((0, 0)) == picture(8, 8).getpixel((0, 0))


def test_corrupt_pictures_are_named(tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.jpg").write_bytes(b"not a picture")
    (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    dataset = open_dataset(str(tmp_path), spec(8, 8), None)
    for index, name in ((1, "b.jpg"), (2, "c.jpg"), (3, "d.png")):
        with pytest.raises(DataError, match=f"^{name}: ") as caught:
            dataset[index]
        assert caught.value.exit_code == 2


def test_default_preprocessing_follows_the_input(tmp_path: Path) -> None:
    grey_last = (TensorSpec("x", (1, 28, 20, 1), "float32"),)
    assert resolve_preprocessing(str(tmp_path), grey_last, None) == ImagePreprocessing(
        28, 20, channels=1, layout="NHWC"
    )
    assert resolve_preprocessing(str(tmp_path), grey_last, LITE0) is LITE0
    assert resolve_preprocessing(str(tmp_path / "x.npz"), grey_last, None) is None


@pytest.mark.parametrize(
    "shape", [(1, 3, Dim("height"), Dim("width")), (1, 5, 8, 8), (1, 16000), (Dim("batch"), Dim("c"), 8, 8)]
)
def test_shapes_that_tell_nothing_need_a_declaration(tmp_path: Path, shape: tuple[int | Dim, ...]) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="declare preprocessing"):
        open_dataset(str(tmp_path), (TensorSpec("x", shape, "float32"),), None)


def test_a_model_that_takes_bytes_gets_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "a.png")
    inputs = (TensorSpec("x", (1, 4, 4, 3), "uint8", "NHWC"),)
    pixels = open_dataset(str(tmp_path), inputs, None)[0].inputs["x"]
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="can't be normalised"):
        open_dataset(str(tmp_path), inputs, ImagePreprocessing(4, 4, layout="NHWC"))


def test_pictures_feed_one_input_only(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    two = (*spec(4, 4), TensorSpec("mask", (1, 4), "bool"))
    with pytest.raises(UsageError, match="pictures feed one input, but the model has 2"):
        open_dataset(str(tmp_path), two, ImagePreprocessing(4, 4))
