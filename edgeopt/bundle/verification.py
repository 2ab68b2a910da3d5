"""Signing a whole bundle, and telling whether one is what somebody signed.

A signature covers `SHA256SUMS`, a text with the hash of every other file: those that the manifest lists, the manifest
itself, and those that it can't list, such as report.json. `sha256sum -c SHA256SUMS` and `minisign -V -m SHA256SUMS`
check the same without edgeopt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeopt.bundle.archive import open_whole
from edgeopt.bundle.archive_whole import AnyBundle, description_of, files_of, listed_in
from edgeopt.bundle.destination import replace_file
from edgeopt.bundle.manifest import DEVICE_REPORT, REPORT, SIGNATURE, SUMS
from edgeopt.bundle.signature import PublicKey, SecretKey, Signature, key_name, parse_signature, sign, verify
from edgeopt.errors import TamperedError, UsageError
from edgeopt.formats.files import sha256_of

#: Files that nothing in the bundle can be sure of: those which are made from all others.
_NOT_SUMMED = frozenset({SUMS, SIGNATURE})


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify_bundle` found in a bundle that it didn't refuse.

    Attributes:
        files: how many there are; every one had the hash that was announced.
        manifest_sha256: of manifest.json, or of generation.json of a network that writes; names this very bundle,
            deltas speak of it.
        signed_by: key number of the signature, verified only if `signature_verified`; None without a signature.
        comment: the signature's trusted comment.
    """

    name: str
    target: str
    status: str
    files: int
    manifest_sha256: str
    signed_by: str | None
    signature_verified: bool
    comment: str | None


def verify_bundle(path: Path, key: PublicKey | None = None) -> Verified:
    """Hold a bundle, or a zipped one, against its manifest and its signature; a network that writes with all parts.

    Args:
        key: whose signature it must carry; None accepts an unsigned bundle.

    Raises TamperedError, naming the file, when one was changed, added or removed; when there is a signature that
    doesn't cover the files as they are; and with a key, when there is none, or one by another key or over something
    else. Raises UsageError when it is no bundle, MissingError when a signature can't be verified here.
    """
    with open_whole(path) as bundle:
        signature = _signature(bundle, path)
        if signature is None and key is not None:
            raise TamperedError(
                "is not signed", where=str(path), fix="get a signed one, or verify the hashes alone, without a key"
            )
        if signature is not None:
            sums = (bundle.path / SUMS).read_bytes()  # once: what was verified is what counts
            if key is not None:
                verify(sums, signature, key, f"{path}: {SIGNATURE}")
            _check_sums(sums, bundle, path)
        return Verified(
            name=bundle.name,
            target=bundle.manifest.target,
            status=bundle.status,
            files=len(files_of(bundle)),
            manifest_sha256=sha256_of(bundle.path / description_of(bundle)),
            signed_by=key_name(signature.number) if signature is not None else None,
            signature_verified=signature is not None and key is not None,
            comment=signature.trusted_comment if signature is not None else None,
        )


def sign_bundle(bundle: AnyBundle, key: SecretKey) -> PublicKey:
    """Write `SHA256SUMS` and `SHA256SUMS.minisig` into the bundle, in place of older ones.

    Raises UsageError when a file has a name that the list can't hold, or the bundle isn't writable; MissingError
    without the package cryptography.
    """
    sums = sums_text(_hashes(bundle))
    comment = f"edgeopt bundle {bundle.name} for {bundle.manifest.target}"
    signature = sign(sums.encode(), key, "".join(c if c.isprintable() else "?" for c in comment))
    # A reader in between finds half a signature, or one that doesn't fit, and refuses it.
    for name, text in ((SUMS, sums), (SIGNATURE, signature)):
        with replace_file(bundle.path / name, Path.is_file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return key.public()


def sums_text(hashes: Mapping[str, str]) -> str:
    """In the form of `sha256sum`. Raises UsageError for a name that would need its escapes."""
    for name in hashes:
        if "\n" in name or "\r" in name or "\\" in name:
            raise UsageError(f"the file name {name!r} can't stand in {SUMS}", fix="rename the file and export again")
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def _hashes(bundle: AnyBundle) -> dict[str, str]:
    """File -> SHA-256. Those in the manifest were verified when the bundle was opened."""
    listed = {name: entry.sha256 for name, entry in listed_in(bundle).items()}
    others = {name for name in files_of(bundle) if name not in listed} - _NOT_SUMMED
    return {**listed, **{name: sha256_of(bundle.path / name) for name in others}}


def _signature(bundle: AnyBundle, path: Path) -> Signature | None:
    """The bundle's signature, None where there is none. Raises TamperedError where there is half of one."""
    present = {name for name in _NOT_SUMMED if (bundle.path / name).is_file()}
    if not present:
        return None
    if present != _NOT_SUMMED:
        (missing,) = _NOT_SUMMED - present
        raise TamperedError(f"lacks {missing}, and has {present.pop()}", where=str(path), fix="sign it again")
    return parse_signature((bundle.path / SIGNATURE).read_bytes(), f"{path}: {SIGNATURE}")


def _check_sums(sums: bytes, bundle: AnyBundle, path: Path) -> None:
    """Raises TamperedError unless SHA256SUMS is about exactly the files that are there, as they are."""
    actual = _hashes(bundle)
    signed = _parse(sums, f"{path}: {SUMS}")
    for name in sorted(signed.keys() | actual.keys()):
        if signed.get(name) != actual.get(name):
            how = "added" if name not in signed else "removed" if name not in actual else "changed"
            raise TamperedError(f"was {how} after the bundle was signed", where=f"{path}: {name}", fix=_advice(name))


def _advice(name: str) -> str:
    if name.rpartition("/")[2] in (REPORT, DEVICE_REPORT):
        return "'edgeopt device run' does that: look at it, then sign the bundle again"
    return "get the bundle again from whoever signed it"


def _parse(text: bytes, where: str) -> dict[str, str]:
    result: dict[str, str] = {}
    for line in text.decode(errors="replace").split("\n")[:-1]:
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != hashlib.sha256().digest_size * 2 or name in result:
            raise TamperedError("is no list of hashes", where=where)
        result[name] = digest
    return result
