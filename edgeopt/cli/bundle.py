"""`edgeopt bundle`: get a bundle ready to be passed on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, size, stdout, table, work
from edgeopt.cli.verify import rows
from edgeopt.errors import UsageError

if TYPE_CHECKING:
    from edgeopt.bundle.delta import DeltaCost
    from edgeopt.progress import Progress

PASSWORD_VARIABLE = "EDGEOPT_KEY_PASSWORD"
_HOW = {"same": "unchanged", "patch": "patch", "whole": "whole file"}


def bundle(
    context: typer.Context,
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="BUNDLE", help="A bundle; with --delta-from and --apply, also one as a .zip file."),
    ] = None,
    archive: Annotated[
        bool, typer.Option("--zip", help="Write it as one .zip file, the same bytes every time.")
    ] = False,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY", help="Sign every file with this secret key of minisign or edgeopt.", show_default=False
        ),
    ] = None,
    delta_from: Annotated[
        Path | None,
        typer.Option(metavar="OLD", help="Write what turns the bundle OLD into this one.", show_default=False),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(metavar="DELTA", help="Make the next version of this bundle with a delta.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The .zip file, the delta, or for --apply the new bundle. --zip has a default: BUNDLE.zip.",
            show_default=False,
        ),
    ] = None,
    public_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="For --apply: whose signature the new bundle must carry.", show_default=False),
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(metavar="NAME", help="Make a key pair, NAME.key and NAME.pub.", show_default=False),
    ] = None,
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Holds the secret key's password. Default: the variable {PASSWORD_VARIABLE}, else a prompt.",
            show_default=False,
        ),
    ] = None,
    no_password: Annotated[
        bool, typer.Option("--no-password", help="For --new-key: leave the secret key unprotected.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Zip a bundle, sign it, or make a delta from the version before.

    Example: edgeopt bundle dist/digits-android-int8 --sign release.key --zip

    Example: edgeopt bundle dist/v2 --delta-from dist/v1 --output v1-v2.delta

    Example: edgeopt bundle dist/v1 --apply v1-v2.delta --output dist/v2

    Example: edgeopt bundle --new-key release
    """
    jobs = {
        "--new-key": new_key is not None,
        "--zip or --sign": archive or sign is not None,
        "--delta-from": delta_from is not None,
        "--apply": apply is not None,
    }
    asked = [name for name, given in jobs.items() if given]
    if len(asked) != 1:
        raise UsageError(
            f"{' and '.join(asked)} can't go together" if asked else "nothing to do",
            fix=None if asked else f"give one of {', '.join(jobs)}",
        )
    alone = {
        "--output": (output is not None, archive or delta_from is not None or apply is not None),
        "--public-key": (public_key is not None, apply is not None),
        "--no-password": (no_password, new_key is not None),
        "--password-file": (password_file is not None, new_key is not None or sign is not None),
        "BUNDLE": (bundle is not None, new_key is None),
    }
    for name, (given, useful) in alone.items():
        if given and not useful:
            raise UsageError(f"{name} has no meaning here", fix="see 'edgeopt bundle --help'")
    if new_key is not None:
        _make_keys(new_key, None if no_password else _password(password_file, f"{new_key}.key", confirm=True), json)
        return
    if bundle is None:
        raise UsageError(f"{asked[0]} needs a BUNDLE")
    if output is None and (delta_from is not None or apply is not None):
        raise UsageError(f"{asked[0]} needs --output")
    if delta_from is not None and output is not None:
        _write_delta(context, delta_from, bundle, output, json)
    elif apply is not None and output is not None:
        _apply(context, bundle, apply, output, public_key, json)
    else:
        _sign_and_zip(context, bundle, sign, password_file, archive, output, json)


def _make_keys(name: Path, password: str | None, json: bool) -> None:
    from edgeopt.bundle.signature_keys import new_key_pair

    secret, public, key = new_key_pair(name, password)
    if json:
        print_json({"secret_key": str(secret), "public_key": str(public), "key": key.name, "text": key.text})
        return
    shown = {
        "Secret key": f"{secret}: keep it to yourself; a lost one can't be made again",
        "Public key": f"{public}, or {key.text}",
    }
    stdout().print(facts(shown))


def _sign_and_zip(
    context: typer.Context,
    path: Path,
    sign: Path | None,
    password_file: Path | None,
    archive: bool,
    output: Path | None,
    json: bool,
) -> None:
    document: dict[str, object] = {"path": str(path)}
    shown: dict[str, str] = {}
    if sign is not None:
        from edgeopt.bundle.signature_keys import read_secret_key

        secret = read_secret_key(sign, _asker(password_file, str(sign)))
    with work(context) as progress:
        progress.step(f"Verifying {path.name}")
        from edgeopt.bundle.archive_whole import open_directory

        opened = open_directory(path)
        if sign is not None:
            from edgeopt.bundle.verification import sign_bundle

            public = sign_bundle(opened, secret)
            beside = sign.with_suffix(".pub")
            known = str(beside) if beside.is_file() else public.text
            document |= {"signed_by": public.name, "public_key": public.text}
            shown |= {
                "Signed": f"{path} with key {public.name}",
                "To check": shlex.join(["edgeopt", "verify", str(path), "--public-key", known]),
            }
        if archive:
            from edgeopt.bundle.archive import write_archive
            from edgeopt.formats.files import sha256_of

            progress.step("Writing the archive")
            written = write_archive(opened, output)
            num_bytes, digest = written.stat().st_size, sha256_of(written)
            document |= {"archive": str(written), "size_bytes": num_bytes, "sha256": digest}
            shown |= {"Archive": f"{written}, {size(num_bytes)}", "SHA-256": digest}
    if json:
        print_json(document)
    else:
        stdout().print(facts(shown))


def _write_delta(context: typer.Context, old: Path, new: Path, output: Path, json: bool) -> None:
    with work(context) as progress:
        cost = _delta(old, new, output, progress)
    if json:
        print_json({"path": str(cost.path), "size_bytes": cost.size_bytes, "delta": cost.delta, "sent": cost.sent})
        return
    console = stdout()
    changes = table("File", "How", "Size", "In the delta", right=("Size", "In the delta"), fold=("File",))
    for name, file in sorted(cost.delta.files.items()):
        if file.how != "same":
            changes.add_row(name, _HOW[file.how], size(file.size_bytes), size(cost.sent[name]))
    for name in cost.delta.removed:
        changes.add_row(name, "removed", "", "")
    console.print(changes)
    same = sum(file.how == "same" for file in cost.delta.files.values())
    whole = sum(file.size_bytes for file in cost.delta.files.values())
    console.print(f"{same} files are unchanged.")
    console.print(f"{cost.path}: {size(cost.size_bytes)} instead of {size(whole)}", soft_wrap=True)


def _delta(old: Path, new: Path, output: Path, progress: Progress) -> DeltaCost:
    from edgeopt.bundle.archive import open_anywhere
    from edgeopt.bundle.delta import write_delta

    progress.step("Verifying the bundles")
    with open_anywhere(old) as before, open_anywhere(new) as after:
        return write_delta(before, after, output, progress)


def _apply(context: typer.Context, old: Path, delta: Path, output: Path, public_key: str | None, json: bool) -> None:
    with work(context) as progress:
        progress.step(f"Applying {delta.name}")
        from edgeopt.bundle.archive import open_anywhere
        from edgeopt.bundle.delta_apply import apply_delta
        from edgeopt.bundle.signature import read_public_key

        key = read_public_key(public_key) if public_key is not None else None
        with open_anywhere(old) as before:
            verified = apply_delta(before, delta, output, key)
    if json:
        print_json({"path": str(output), "verified": verified})
        return
    stdout().print(facts({"Written": str(output), **rows(verified)}))


def _asker(file: Path | None, key: str) -> Callable[[], str]:
    """Asks only when the key turns out to need a password."""
    return lambda: _password(file, key, confirm=False)


def _password(file: Path | None, key: str, *, confirm: bool) -> str:
    """From a file's first line, the environment, or the terminal."""
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8", errors="surrogateescape")  # as bytes of the environment come
            return text.partition("\n")[0].removesuffix("\r")
        except OSError as error:
            raise UsageError(f"can't be read: {error.strerror}", where=str(file)) from error
    given = os.environ.get(PASSWORD_VARIABLE)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        how = ", or --no-password" if confirm else ""
        raise UsageError("needs a password", where=key, fix=f"set {PASSWORD_VARIABLE}, give --password-file{how}")
    from getpass import getpass

    password = getpass(f"Password for {key}: ")
    if confirm and getpass("Once more: ") != password:
        raise UsageError("the two passwords differ", where=key)
    return password
