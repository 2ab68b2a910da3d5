"""Multi30k, English to German: 29 000 captions of pictures with their translations (Elliott et al. 2016).

The files are those of the data set's public repository, https://github.com/multi30k/dataset, data/task1/raw.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from edgeopt.case_studies.corpus import Corpus, TextPair, downloaded
from edgeopt.emulator.download import Download, sha256_of
from edgeopt.errors import DataError
from edgeopt.progress import Progress

_FOLDERS = (
    "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/",
    "https://github.com/multi30k/dataset/raw/master/data/task1/raw/",
)
#: File -> (SHA-256, bytes).
FILES = {
    "train.en.gz": ("d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f", 568_929),
    "train.de.gz": ("726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6", 637_044),
    "val.en.gz": ("14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28", 21_650),
    "val.de.gz": ("f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a", 24_681),
    "test_2016_flickr.en.gz": ("611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9", 21_077),
    "test_2016_flickr.de.gz": ("9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8", 22_890),
}
_FIX = "download the six files of data/task1/raw from github.com/multi30k/dataset and give --data DIR"


def load(directory: Path | None, progress: Progress) -> Corpus:
    """The data set.

    Args:
        directory: holds the files of `FILES`; None takes them from $EDGEOPT_HOME/data, downloading what is not there.

    Raises:
        DataError: a file of `directory` is missing or is another one than the published one.
        MissingError: nothing can be downloaded.
    """
    paths = {name: _path(name, directory, progress) for name in FILES}

    def pairs(part: str) -> tuple[TextPair, ...]:
        english, german = (_sentences(paths[f"{part}.{language}.gz"]) for language in ("en", "de"))
        return tuple(zip(english, german, strict=True))

    return Corpus(
        title="Multi30k, English to German",
        task="translation",
        train=pairs("train"),
        validation=pairs("val"),
        test=pairs("test_2016_flickr"),
        files={name: sha256 for name, (sha256, _) in FILES.items()},
    )


def _path(name: str, directory: Path | None, progress: Progress) -> Path:
    sha256, size = FILES[name]
    if directory is None:
        return downloaded(Download(name, tuple(folder + name for folder in _FOLDERS), sha256, size), progress, _FIX)
    path = directory / name
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), fix=f"--data takes a folder with {', '.join(FILES)}")
    if sha256_of(path) != sha256:
        raise DataError(
            "is not the published file: its SHA-256 is another", where=str(path), fix="download it again, as it is"
        )
    return path


def _sentences(path: Path) -> list[str]:
    try:
        text = gzip.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"can't be read: {error}", where=str(path)) from error
    return [line.strip() for line in text.splitlines()]
