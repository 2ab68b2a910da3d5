"""Two files layer by layer: where a quantized file, or another runtime, leaves the path of the first."""

from edgeopt.debugging.results import Debugging, Divergence, LayerError
from edgeopt.debugging.run import debug

__all__ = ["Debugging", "Divergence", "LayerError", "debug"]
