"""The licence of an installed Python package, from what the package says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import PurePosixPath

#: Spellings that packages use in `License`, and in classifiers from before they had SPDX expressions.
_SPDX = {
    "apache software license": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "mit license": "MIT",
    "isc license (iscl)": "ISC",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
}
_CLASSIFIER = "License :: OSI Approved :: "
_FILE_NAMES = ("license", "license.txt", "license.md", "copying", "notice", "notice.txt")


@dataclass(frozen=True, slots=True)
class Licence:
    """Attributes:
    expression: in SPDX's terms; None when the package names no licence that SPDX knows.
    name: in the package's own words, the expression where there is one; "unknown" without any.
    """

    expression: str | None
    name: str


UNKNOWN = Licence(None, "unknown")


def licence_of(package: str) -> Licence:
    """The licence of an installed package; `UNKNOWN` when it isn't installed or doesn't say."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return UNKNOWN
    names = _names(found)
    for name in names:
        known = spdx(name) or spdx(_SPDX.get(name.lower(), ""))
        if known is not None:
            return Licence(known, known)
    if not names or names[0].lower() in ("bsd", "bsd license"):  # which BSD, only the text tells
        read = _read(_texts(found))
        if read is not None:
            return Licence(read, read)
    return Licence(None, names[0]) if names else UNKNOWN


def licence_text(package: str) -> str:
    """The licence files of an installed package, one after another; "" when there are none."""
    try:
        return _texts(distribution(package))
    except PackageNotFoundError:
        return ""


def spdx(expression: str) -> str | None:
    """The expression as SPDX spells it; None when it is none."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        return canonicalize_license_expression(expression)
    except InvalidLicenseExpression:
        return None


def _read(text: str) -> str | None:
    """The licence that a text begins with, as an SPDX expression."""
    flat = " ".join(text.split())
    beginning = flat[:800]
    if "Redistribution and use in source and binary forms" in beginning:
        return "BSD-3-Clause" if "Neither the name" in flat else "BSD-2-Clause"
    if "Apache License Version 2.0" in beginning:
        return "Apache-2.0"
    if "Permission is hereby granted, free of charge, to any person obtaining a copy" in beginning:
        return "MIT"
    return None


def _names(found: Distribution) -> list[str]:
    """What the metadata calls the licence, the most exact first; a whole licence text is no name."""
    exact = found.metadata.get_all("License-Expression") or []
    free = [value for value in found.metadata.get_all("License") or [] if value.strip() and "\n" not in value]
    classifiers = found.metadata.get_all("Classifier") or []
    classified = [value.removeprefix(_CLASSIFIER) for value in classifiers if value.startswith(_CLASSIFIER)]
    return [name.strip() for name in (*exact, *free, *classified)]


def _texts(found: Distribution) -> str:
    """Licence files of the package itself, not those of what it carries inside."""
    wanted = [
        file
        for file in found.files or ()
        if PurePosixPath(file).name.lower() in _FILE_NAMES and _is_own(PurePosixPath(file))
    ]
    texts = (file.read_text(encoding="utf-8").strip() for file in sorted(wanted, key=str))
    return "\n\n".join(dict.fromkeys(text for text in texts if text))


def _is_own(file: PurePosixPath) -> bool:
    """At the top of the metadata, of its folder of licences, of the package, or of a source tree."""
    inner = [part for part in file.parts[:-1] if part != "licenses"]
    return len(inner) <= 1
