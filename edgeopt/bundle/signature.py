"""Signatures as minisign makes them: Ed25519 over the BLAKE2b-512 hash of a file.

The format is minisign's (https://jedisct1.github.io/minisign/), so `minisign -V` checks what we sign and the other way
round. A signature is four lines: a comment that anybody may change, base64 of (algorithm, key number, signature), a
trusted comment, and base64 of a second signature over the first one and the trusted comment.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeopt.errors import MissingError, TamperedError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ALGORITHM = b"Ed"
#: Of a signature over the file's hash; `ALGORITHM` in a signature means: over the file itself, as minisign -l does.
PREHASHED = b"ED"
UNTRUSTED = "untrusted comment: "
TRUSTED = "trusted comment: "
_NUMBER_BYTES = 8
_KEY_BYTES = 32
_SIGNATURE_BYTES = 64
#: No key and no signature is larger; anything else need not be read at all.
_MOST_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class PublicKey:
    """What to verify with. `number` only tells keys apart; it is no hash of the key."""

    number: bytes
    key: bytes

    @property
    def name(self) -> str:
        """The key number as minisign prints it: "F36EDAEFEF42025A"."""
        return key_name(self.number)

    @property
    def text(self) -> str:
        """The one-line form, as `minisign -P` takes it."""
        return base64.b64encode(ALGORITHM + self.number + self.key).decode()


@dataclass(frozen=True, slots=True)
class SecretKey:
    """What to sign with: the seed of an Ed25519 key pair."""

    number: bytes
    seed: bytes

    def public(self) -> PublicKey:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        key = Ed25519PrivateKey.from_private_bytes(self.seed).public_key()
        return PublicKey(self.number, key.public_bytes_raw())

    def __repr__(self) -> str:
        return f"SecretKey({key_name(self.number)})"  # a traceback must not print the seed


@dataclass(frozen=True, slots=True)
class Signature:
    """A parsed signature, not verified yet."""

    algorithm: bytes
    number: bytes
    signature: bytes
    trusted_comment: str
    global_signature: bytes


def sign(content: bytes, key: SecretKey, trusted_comment: str) -> str:
    """The text of a .minisig file; the same content, key and comment always give the same.

    Raises MissingError without the package cryptography, UsageError for a comment of several lines.
    """
    require_cryptography("signing")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not trusted_comment.isprintable():
        raise UsageError("a trusted comment is one line of printable text")
    private = Ed25519PrivateKey.from_private_bytes(key.seed)
    signature = private.sign(hashlib.blake2b(content).digest())
    global_signature = private.sign(signature + trusted_comment.encode())
    lines = (
        f"{UNTRUSTED}signature from edgeopt, key {key_name(key.number)}",
        base64.b64encode(PREHASHED + key.number + signature).decode(),
        f"{TRUSTED}{trusted_comment}",
        base64.b64encode(global_signature).decode(),
    )
    return "".join(f"{line}\n" for line in lines)


def verify(content: bytes, signature: Signature, key: PublicKey, where: str) -> None:
    """Raises TamperedError naming `where` unless the key's owner signed this content with this trusted comment."""
    require_cryptography("verifying a signature")
    if signature.number != key.number:
        raise TamperedError(
            f"was signed with key {key_name(signature.number)}, not with {key.name}",
            where=where,
            fix="take the public key of whoever signed it, if you trust them",
        )
    public = _load(key)
    signed = hashlib.blake2b(content).digest() if signature.algorithm == PREHASHED else content
    if not _is_valid(public, signature.signature, signed):
        raise TamperedError(f"is no signature of key {key.name} over this content", where=where)
    if not _is_valid(public, signature.global_signature, signature.signature + signature.trusted_comment.encode()):
        raise TamperedError("the trusted comment was changed after signing", where=where)


def parse_signature(text: bytes, where: str) -> Signature:
    """Raises TamperedError on anything but the four lines."""
    lines = _lines(text)
    if len(lines) != 4 or not lines[0].startswith(UNTRUSTED) or not lines[2].startswith(TRUSTED):
        raise TamperedError("is no minisign signature", where=where)
    body, global_signature = _decode(lines[1]), _decode(lines[3])
    size = len(ALGORITHM) + _NUMBER_BYTES + _SIGNATURE_BYTES
    if len(body) != size or body[:2] not in (ALGORITHM, PREHASHED) or len(global_signature) != _SIGNATURE_BYTES:
        raise TamperedError("is no minisign signature", where=where)
    return Signature(
        algorithm=body[:2],
        number=body[2:10],
        signature=body[10:],
        trusted_comment=lines[2].removeprefix(TRUSTED),
        global_signature=global_signature,
    )


def parse_public_key(text: bytes, where: str) -> PublicKey:
    """A key file of two lines, or the second one alone. Raises UsageError on anything else."""
    lines = _lines(text)
    body = _decode(lines[-1]) if len(lines) in (1, 2) else b""
    if len(body) != len(ALGORITHM) + _NUMBER_BYTES + _KEY_BYTES or body[:2] != ALGORITHM:
        raise UsageError("is no minisign public key", where=where, fix="it looks like RWQ..., 56 characters")
    return PublicKey(number=body[2:10], key=body[10:])


def read_public_key(given: str) -> PublicKey:
    """From a file, or from the key itself as 56 characters. Raises UsageError when it is neither."""
    path = Path(given)
    if len(given) == 56 and given.startswith("RW"):
        return parse_public_key(given.encode(), "public key")
    try:
        with path.open("rb") as file:
            return parse_public_key(file.read(_MOST_BYTES), given)
    except OSError as error:
        raise UsageError(f"the public key can't be read: {error.strerror}", where=given) from error


def require_cryptography(purpose: str) -> None:
    """Raises MissingError without the package that computes Ed25519."""
    try:
        import cryptography.hazmat.primitives.asymmetric.ed25519  # noqa: F401
    except ImportError as error:
        raise MissingError.extra("cryptography", "shipping", purpose) from error


def key_name(number: bytes) -> str:
    return f"{int.from_bytes(number, 'little'):016X}"


def _load(key: PublicKey) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(key.key)


def _is_valid(key: Ed25519PublicKey, signature: bytes, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, content)
    except InvalidSignature:
        return False
    return True


def _lines(text: bytes) -> list[str]:
    """Split at line feeds only: other separators are part of a comment, and signed with it."""
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError:
        return []
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _decode(line: str) -> bytes:
    """Base64, b"" where it isn't any."""
    try:
        return base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return b""
