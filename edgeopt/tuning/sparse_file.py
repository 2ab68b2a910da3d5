"""The zeros of a sparsified model: as the runtime's sparse kernels take them, and what they save in storage."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

from edgeopt.bundle.sparse_storage import compare, is_sparse
from edgeopt.exporter import load_exporter
from edgeopt.formats.sparsity import zeros_of
from edgeopt.types import Artifact, Finding


def with_sparse_kernels(artifact: Artifact, directory: Path) -> tuple[Artifact, tuple[Finding, ...]]:
    """The file to ship, and what became of its zeros; the file as it is where its model was never sparsified.

    Raises ConversionError where the runtime does not run what was written.
    """
    if not is_sparse(artifact.history):
        return artifact, ()
    share = zeros_of(artifact.path).share
    folder = Path(mkdtemp(prefix="sparse-", dir=directory))
    stored, told = load_exporter(artifact.format).store_sparse(artifact, folder)
    sizes = compare(stored.path)
    storage = (
        f"{share:.1%} of the file's weights are zero; {_kib(sizes.plain)}, deflated (as in an app's package) "
        f"{_kib(sizes.deflated)}, packed {_kib(sizes.packed_deflated)}"
    )
    return stored, (Finding("zeros", "storage", storage), *told)


def _kib(size: int) -> str:
    return f"{size / 1024:.1f} KiB"
