"""Preprocessing as a table."""

from __future__ import annotations

import json
import tomllib

import pytest

from edgeopt.datasets import check_preprocessing, dump_preprocessing, load_preprocessing
from edgeopt.errors import ConfigError
from edgeopt.types import (
    ArrayPreprocessing,
    AudioPreprocessing,
    ImagePreprocessing,
    Preprocessing,
    TextPreprocessing,
)

EXAMPLES: list[Preprocessing] = [
    ImagePreprocessing(
        224, 224, crop_fraction=0.875, interpolation="bicubic", rescale=1.0, mean=(127.0,) * 3, std=(128.0,) * 3
    ),
    ImagePreprocessing(28, 20, channels=1, resize_shorter=32, layout="NHWC", std=(1 / 3,)),
    TextPreprocessing("tokenizer", 64, "none", ("premise", "hypothesis")),
    AudioPreprocessing(8_000, 4_000, 0.1, 0.2, True),
    ArrayPreprocessing(10.0, (1.0, 2.0), (0.5, 0.25), -1),
]


@pytest.mark.parametrize("preprocessing", EXAMPLES, ids=lambda p: p.kind)
def test_round_trip_through_json(preprocessing: Preprocessing) -> None:
    table = json.loads(json.dumps(dump_preprocessing(preprocessing)))
    assert table["kind"] == preprocessing.kind
    assert load_preprocessing(table) == preprocessing


def test_toml_in_kebab_case_with_whole_numbers_and_lone_values() -> None:
    table = tomllib.loads(
        """
        kind = "image"
        height = 224
        width = 224
        crop-fraction = 0.875
        interpolation = "bicubic"
        rescale = 1
        mean = 127
        std = [128]
        """
    )
    loaded = load_preprocessing(table)
    assert loaded == ImagePreprocessing(
        224, 224, crop_fraction=0.875, interpolation="bicubic", rescale=1.0, mean=(127.0,), std=(128.0,)
    )
    assert isinstance(loaded, ImagePreprocessing)
    assert isinstance(loaded.mean[0], float)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "has no kind; use one of image, text, audio, array"),
        ({"kind": "imgae"}, "unknown kind 'imgae'; did you mean 'image'"),
        ({"kind": 3}, "unknown kind 3"),
        ({"kind": "image", "hieght": 3}, "unknown key 'hieght'; did you mean 'height'"),
        ({"kind": "image", "crop-frac": 0.5}, "did you mean 'crop_fraction'"),
        ({"kind": "image", "height": 4}, "has no 'width'"),
        ({"kind": "image", "height": 4.5, "width": 4}, "height: is 4.5, not a whole number"),
        ({"kind": "image", "height": True, "width": 4}, "height: is True, not a whole number"),
        ({"kind": "image", "height": None, "width": 4}, "height: is None, not a whole number"),
        ({"kind": "image", "height": 4, "width": 4, "mean": ["a"]}, "mean: is 'a', not a number"),
        ({"kind": "image", "height": 4, "width": 4, "channels": 4}, "channels: is 4; use one of 1, 3"),
        ({"kind": "image", "height": 4, "width": 4, "layout": ["NCHW"]}, "layout: is"),
        ({"kind": "image", "height": 4, "width": 4, "interpolation": "cubic"}, "use one of nearest, bilinear"),
        ({"kind": "text", "tokenizer": 3}, "tokenizer: is 3, not text"),
        ({"kind": "audio", "channel-axis": 1}, "channel_axis: is 1, not true or false"),
    ],
)
def test_mistakes_are_named(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_preprocessing(table)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [
        (ImagePreprocessing(0, 4), "height and width must be at least 1"),
        (ImagePreprocessing(4, 4, crop_fraction=1.5), r"crop_fraction must be in \(0, 1\]"),
        (ImagePreprocessing(4, 8, resize_shorter=6), "resize_shorter must be at least the 4 x 8"),
        (ImagePreprocessing(4, 4, std=(0.0,)), "they can't be 0"),
        (ImagePreprocessing(4, 4, rescale=0), "they can't be 0"),
        (ImagePreprocessing(4, 4, mean=(1.0, 2.0)), "mean needs 1 or 3 values, it has 2"),
        (ImagePreprocessing(4, 4, mean=()), "need at least one value"),
        (ImagePreprocessing(4, 4, mean=(float("nan"),)), "must be finite"),
        (ArrayPreprocessing(mean=(1.0, 2.0), std=(1.0, 2.0, 3.0)), "mean has 2 values, std 3"),
        (TextPreprocessing("t", 0), "max_length must be at least 1"),
        (TextPreprocessing("t", text_keys=()), "one text or a pair"),
        (AudioPreprocessing(sample_rate=0), "sample_rate must be at least 1"),
        (AudioPreprocessing(std=0.0), "they can't be 0"),
    ],
)
def test_impossible_values_are_refused_whoever_made_them(preprocessing: Preprocessing, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_preprocessing(preprocessing)
