"""Making the new bundle from the old one and a delta that anybody may have made."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

from edgeopt.bundle.archive import naming
from edgeopt.bundle.archive_members import MOST_JSON_BYTES, Member, check_name, check_total, members_of, read_small
from edgeopt.bundle.archive_output import is_script
from edgeopt.bundle.delta import DELTA, Delta, DeltaFile, opened, parse_delta, version_of
from edgeopt.bundle.delta_patch import apply_patch
from edgeopt.bundle.destination import prepare_output, replace_directory
from edgeopt.bundle.manifest import MANIFEST
from edgeopt.bundle.reader import LoadedBundle
from edgeopt.bundle.signature import PublicKey
from edgeopt.bundle.verification import Verified, verify_bundle
from edgeopt.errors import TamperedError, UsageError


def apply_delta(old: LoadedBundle, path: Path, output: Path, key: PublicKey | None = None) -> Verified:
    """Write the new bundle to `output`, byte for byte what the delta was made from, and verify it.

    Args:
        key: whose signature the new bundle must carry. Without it, hashes are verified, but a delta that somebody
            made up is as good as any other.

    Raises UsageError when the file is no delta, or a delta for another bundle; TamperedError when a member or the
    bundle that comes out isn't what was announced, or isn't signed with `key`. Nothing is left at `output` then.
    """
    with opened(path) as archive:
        try:
            return _apply(archive, old, path, output, key)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise TamperedError(f"is damaged ({error})", where=str(path)) from error


def _apply(archive: zipfile.ZipFile, old: LoadedBundle, path: Path, output: Path, key: PublicKey | None) -> Verified:
    members = members_of(archive, str(path))
    delta = parse_delta(read_small(archive, members[DELTA], MOST_JSON_BYTES, str(path)), f"{path}: {DELTA}")
    _check(delta, members, old, path)
    prepare_output(output)
    with replace_directory(output) as directory:
        packed = path.stat().st_size + sum(entry.size_bytes for entry in old.manifest.files.values())
        check_total(sum(file.size_bytes for file in delta.files.values()), packed, directory.parent, str(path))
        for name, file in sorted(delta.files.items()):
            content = _content(archive, members, old, file, path, name)
            if len(content) != file.size_bytes or hashlib.sha256(content).hexdigest() != file.sha256:
                raise TamperedError("doesn't come out as announced (SHA-256 differs)", where=f"{path}: {name}")
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            if is_script(target):
                target.chmod(0o755)
        with naming(path, directory):
            verified = verify_bundle(directory, key)
        if verified.manifest_sha256 != delta.new.manifest_sha256:
            raise TamperedError(f"makes another {MANIFEST} than it says", where=str(path))
    return verified


def _check(delta: Delta, members: dict[str, Member], old: LoadedBundle, path: Path) -> None:
    """Raises unless the delta is for this bundle, and speaks of names and members that can be."""
    if version_of(old).manifest_sha256 != delta.old.manifest_sha256:
        raise UsageError(
            f"is a delta for another bundle: {delta.old.name} for {delta.old.target}, whose {MANIFEST} has the SHA-256 "
            f"{delta.old.manifest_sha256[:16]}..., and this one's {version_of(old).manifest_sha256[:16]}...",
            where=str(path),
            fix="apply it to the bundle that it was made from",
        )
    for name, file in delta.files.items():
        check_name(name, f"{path}: {DELTA}")
        if file.size_bytes < 0:
            raise TamperedError(f"has the size {file.size_bytes}", where=f"{path}: {name}")
        base = old.manifest.files.get(file.base) if file.base is not None else None
        if (file.how == "whole") != (file.base is None) or (base.sha256 if base else None) != file.base_sha256:
            raise TamperedError(f"needs the file {file.base!r}, which the old bundle lacks", where=f"{path}: {name}")
        if file.how != "same" and (file.member is None or file.member not in members):
            raise TamperedError(f"lacks its member {file.member!r}", where=f"{path}: {name}")
    wanted = {file.member for file in delta.files.values()} | {DELTA}
    for name in sorted(members.keys() - wanted):
        raise TamperedError(f"holds {name!r}, which {DELTA} doesn't speak of", where=str(path))


def _content(
    archive: zipfile.ZipFile, members: dict[str, Member], old: LoadedBundle, file: DeltaFile, path: Path, name: str
) -> bytes:
    where = f"{path}: {name}"
    before = (old.path / file.base).read_bytes() if file.base is not None else b""
    if file.how == "same" or file.member is None:
        return before
    member = members[file.member]
    if file.how == "whole":
        return read_small(archive, member, file.size_bytes, where)
    # Patches are stored uncompressed, so none is larger than the archive.
    return apply_patch(before, read_small(archive, member, path.stat().st_size, where), file.size_bytes, where)
