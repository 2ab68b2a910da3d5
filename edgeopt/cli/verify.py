"""`edgeopt verify`: is a bundle what somebody made and signed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeopt.cli.console import JsonFlag, facts, print_json, stdout, visible, work

if TYPE_CHECKING:
    from edgeopt.bundle.verification import Verified


def verify(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or one as a .zip file.")],
    public_key: Annotated[
        str | None,
        typer.Option(
            "--public-key",
            metavar="KEY",
            help="Whose signature it must carry: a .pub file of minisign or edgeopt, or the key itself (RW...).",
            show_default=False,
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Refuse a bundle of which a file was changed, added or removed, or that isn't signed with the given key.

    Example: edgeopt verify dist/digits-android-int8.zip --public-key release.pub

    Nothing in the bundle is run. The exit code is 0 when it is intact and 2 when it is refused. Without --public-key,
    hashes find damage, but don't tell who made it.
    """
    with work(context) as progress:
        progress.step(f"Verifying {bundle.name}")
        from edgeopt.bundle.signature import read_public_key
        from edgeopt.bundle.verification import verify_bundle

        verified = verify_bundle(bundle, read_public_key(public_key) if public_key is not None else None)
    if json:
        print_json({"path": str(bundle), "verified": verified})
        return
    stdout().print(facts(rows(verified)))


def rows(verified: Verified) -> dict[str, str]:
    """What was found, for people. A line break in a name must not look like another row."""
    if verified.signed_by is None:
        signature = "none"
    elif verified.signature_verified:
        signature = f"valid, key {verified.signed_by}"
    else:
        signature = f"of key {verified.signed_by}, NOT verified: give --public-key"
    return {
        "Bundle": visible(f"{verified.name} for {verified.target}, {verified.status}"),
        "Files": f"{verified.files}, as the manifest says",
        "Manifest": verified.manifest_sha256,
        "Signature": signature,
        "Comment": visible(verified.comment or "") if verified.signature_verified else "",
    }
