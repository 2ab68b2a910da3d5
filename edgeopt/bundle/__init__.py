"""What the app developer receives: one directory with the model, its proof, and how to use it."""

from __future__ import annotations

from edgeopt.bundle.contents import BundleContents, GoldenVector
from edgeopt.bundle.destination import prepare_output
from edgeopt.bundle.reader import LoadedBundle, open_bundle
from edgeopt.bundle.writer import write_bundle

__all__ = ["BundleContents", "GoldenVector", "LoadedBundle", "open_bundle", "prepare_output", "write_bundle"]
