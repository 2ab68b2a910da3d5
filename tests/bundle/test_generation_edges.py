"""A network that writes at the edges: written again in place of an older one, refused where one bundle is wanted."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from edgeopt.bundle import open_bundle
from edgeopt.bundle.destination import prepare_output
from edgeopt.bundle.generation import write_generation_bundle
from edgeopt.bundle.generation_reader import open_generation_bundle
from edgeopt.bundle.verification import verify_bundle
from edgeopt.cli.bundle import bundle
from edgeopt.cli.console import Settings
from edgeopt.errors import UsageError

_spec = spec_from_file_location("generation_toys", Path(__file__).parent / "fixtures/generation_toys.py")
assert _spec is not None
assert _spec.loader is not None
toys = module_from_spec(_spec)
_spec.loader.exec_module(toys)


def test_an_older_bundle_is_replaced_unless_somebody_put_files_into_it(tmp_path: Path) -> None:
    made = toys.contents(tmp_path / "work")
    final = write_generation_bundle(tmp_path / "toy", made).path
    (final / "decoder/device_report.json").write_text("{}")  # measured later, and ours
    prepare_output(final)
    write_generation_bundle(final, toys.contents(tmp_path / "work", beams=1))
    assert open_generation_bundle(final).beams == 1
    (final / "decoder/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="would be lost"):
        write_generation_bundle(final, made)
    assert open_bundle(final / "encoder").name == "toy-encoder"
    with pytest.raises(UsageError, match="give one of them, such as") as caught:
        open_bundle(final)
    assert caught.value.where == str(final)


def test_the_command_line_zips_the_whole(tmp_path: Path) -> None:
    final = write_generation_bundle(tmp_path / "toy", toys.contents(tmp_path / "work")).path
    app = typer.Typer()
    app.command()(bundle)
    done = CliRunner().invoke(app, [str(final), "--zip", "--json"], obj=Settings(debug=True))
    assert done.exit_code == 0, done.output
    assert verify_bundle(Path(json.loads(done.stdout)["archive"])).name == "toy"
