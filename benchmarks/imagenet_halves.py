"""Splits the one-picture-per-class folder into even classes (calibration) and odd ones (evaluation)."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet_one_per_class"


def split(destination: Path, pictures: Path = PICTURES) -> tuple[Path, Path]:
    """Make `destination/{even,odd}` of links with a labels.csv each; sorted file order is the class index."""
    folders = (destination / "even", destination / "odd")
    for parity, folder in enumerate(folders):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("file", "label"))
            for index, picture in enumerate(sorted(pictures.glob("*.jpg"))):
                if index % 2 == parity:
                    link = folder / picture.name
                    if not link.exists():
                        link.symlink_to(picture)
                    rows.writerow((picture.name, index))
    return folders


if __name__ == "__main__":
    print(*split(Path(sys.argv[1])))
