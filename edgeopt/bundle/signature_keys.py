"""Key files as minisign makes them: `NAME.key`, with a password or without, and `NAME.pub`."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from edgeopt.bundle.signature import ALGORITHM, UNTRUSTED, PublicKey, SecretKey, require_cryptography
from edgeopt.errors import MissingError, UsageError

_SCRYPT = b"Sc"
_NO_PASSWORD = b"\0\0"
_CHECKSUM = b"B2"
#: What minisign asks of scrypt: 2^20 rounds over 1 GiB, some seconds. A stolen key file is only as good as this.
OPERATIONS = 1 << 25
MEMORY = 1 << 30
#: algorithm, key derivation, checksum algorithm, salt, operations, memory; then key number, seed, public key, checksum
_HEAD, _SALT, _BODY, _TOTAL = 6, 32, 104, 158


def new_key_pair(
    name: Path, password: str | None, operations: int = OPERATIONS, memory: int = MEMORY
) -> tuple[Path, Path, PublicKey]:
    """Write `<name>.key` (readable by its owner only) and `<name>.pub`.

    Args:
        password: encrypts the secret key; None leaves it in plain text, as `minisign -W` does.
        operations, memory: cost of deriving a key from the password, in libsodium's units.

    Raises UsageError when one of them is there already, or can't be written; MissingError without cryptography.
    """
    require_cryptography("making a key pair")
    key = SecretKey(secrets.token_bytes(8), secrets.token_bytes(32))
    public = key.public()
    paths = (name.with_name(f"{name.name}.key"), name.with_name(f"{name.name}.pub"))
    for path in paths:
        if path.exists() or path.is_symlink():
            raise UsageError("is there already, and a lost key can't be made again", where=str(path))
    secret_text = _secret_key_text(key, public, password, operations, memory)
    _create(paths[0], secret_text, mode=0o600)
    try:
        _create(paths[1], f"{UNTRUSTED}minisign public key {public.name}\n{public.text}\n", mode=0o644)
    except BaseException:
        paths[0].unlink(missing_ok=True)
        raise
    return (*paths, public)


def read_secret_key(path: Path, password: Callable[[], str]) -> SecretKey:
    """Raises UsageError when the file is no secret key, or `password` (asked for only if it needs one) is wrong."""
    require_cryptography("signing")
    body = _read(path)
    derivation = body[2:4]
    if body[:2] != ALGORITHM or derivation not in (_SCRYPT, _NO_PASSWORD) or body[4:_HEAD] != _CHECKSUM:
        raise UsageError("is a secret key of a kind that we don't know", where=str(path))
    salt, rest = body[_HEAD : _HEAD + _SALT], body[_HEAD + _SALT :]
    secret = rest[16:]
    if derivation == _SCRYPT:
        operations, memory = (int.from_bytes(rest[at : at + 8], "little") for at in (0, 8))
        secret = _xor(secret, _derive(password(), salt, operations, memory, str(path)))
    number, seed, public, checksum = secret[:8], secret[8:40], secret[40:72], secret[72:]
    # minisign leaves the checksum of a key without a password empty.
    if (derivation == _SCRYPT or any(checksum)) and checksum != _checksum(number, seed + public):
        problem = "the password is wrong" if derivation == _SCRYPT else "is damaged (its checksum differs)"
        raise UsageError(problem, where=str(path))
    key = SecretKey(number, seed)
    if key.public().key != public:
        raise UsageError("is damaged: its two halves don't belong together", where=str(path))
    return key


def _read(path: Path) -> bytes:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.stat().st_size < 4096 else []
        body = base64.b64decode(lines[1], validate=True) if len(lines) == 2 else b""
    except OSError as error:
        raise UsageError(f"the secret key can't be read: {error.strerror}", where=str(path)) from error
    except ValueError:
        body = b""
    if len(body) != _TOTAL:
        raise UsageError(
            "is no minisign secret key", where=str(path), fix="'edgeopt bundle --new-key NAME' makes a key pair"
        )
    return body


def _secret_key_text(key: SecretKey, public: PublicKey, password: str | None, operations: int, memory: int) -> str:
    pair = key.seed + public.key
    kind = _NO_PASSWORD if password is None else _SCRYPT
    if password is None:
        head = bytes(_SALT + 16)
        secret = key.number + pair + bytes(32)
    else:
        salt = secrets.token_bytes(_SALT)
        head = salt + operations.to_bytes(8, "little") + memory.to_bytes(8, "little")
        secret = key.number + pair + _checksum(key.number, pair)
        secret = _xor(secret, _derive(password, salt, operations, memory, "the new key"))
    text = base64.b64encode(ALGORITHM + kind + _CHECKSUM + head + secret).decode()
    return f"{UNTRUSTED}minisign encrypted secret key\n{text}\n"


def _derive(password: str, salt: bytes, operations: int, memory: int, where: str) -> bytes:
    """scrypt with the cost parameters that libsodium's pwhash_scryptsalsa208sha256 picks for these limits."""
    log_n, blocks, parallel = _costs(operations, memory)
    if 128 * blocks << log_n > MEMORY or parallel > 16:
        raise UsageError("asks for more than 1 GiB to derive a key from the password", where=where)
    secret = password.encode(errors="surrogateescape")  # the very bytes that came from a file or the environment
    try:
        return hashlib.scrypt(secret, salt=salt, n=1 << log_n, r=blocks, p=parallel, maxmem=(1 << 31) - 1, dklen=_BODY)
    except (MemoryError, ValueError) as error:  # OpenSSL tells of a failed allocation as a ValueError
        raise MissingError(
            f"deriving a key from the password takes {(128 * blocks << log_n) >> 20} MiB of memory", where=where
        ) from error


def _costs(operations: int, memory: int) -> tuple[int, int, int]:
    """log2 N, r and p of scrypt."""
    operations, blocks = max(operations, 32768), 8
    if operations < memory // 32:
        return _log2(operations // (4 * blocks)), blocks, 1
    log_n = _log2(memory // (128 * blocks))
    return log_n, blocks, min((operations // 4) >> log_n, 0x3FFFFFFF) // blocks


def _log2(largest: int) -> int:
    """The largest power of two up to `largest`, 2 at least."""
    return max(1, largest.bit_length() - 1)


def _checksum(number: bytes, pair: bytes) -> bytes:
    return hashlib.blake2b(ALGORITHM + number + pair, digest_size=32).digest()


def _xor(a: bytes, b: bytes) -> bytes:
    return bytes(x ^ y for x, y in zip(a, b, strict=True))


def _create(path: Path, text: str, mode: int) -> None:
    """A new file that only ever had this mode; gone again when it can't be written whole."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except OSError as error:
        raise UsageError(f"can't be written: {error.strerror}", where=str(path)) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            os.fsync(handle)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise UsageError(f"can't be written: {error.strerror}", where=str(path)) from error
