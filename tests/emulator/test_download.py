from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgeopt.emulator.download import Download, fetch, mirrors
from edgeopt.errors import MissingError, TamperedError

CONTENT = bytes(range(256)) * 4000
SHA = hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def server(content: bytes, *, ranges: bool = True, status: int = 200, cut: int | None = None) -> Iterator[str]:
    """A mirror. `cut`: it hangs up after so many bytes of an answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-")) if ranges else 0
            self.send_response(206 if status == 200 and ranges else status)
            body = content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/file.deb"
        finally:
            httpd.shutdown()
            thread.join()


def wanted(*urls: str) -> Download:
    return Download("file.deb", urls, SHA, len(CONTENT))


def ignore(num_bytes: int) -> None:
    del num_bytes


def test_downloads_once(tmp_path: Path) -> None:
    told: list[int] = []
    with server(CONTENT) as url:
        path = fetch(wanted(url), tmp_path, told.append)
    assert path.read_bytes() == CONTENT
    assert fetch(wanted("http://127.0.0.1:1/gone"), tmp_path, told.append) == path
    assert sum(told) == 2 * len(CONTENT)


@pytest.mark.parametrize("ranges", [True, False])
def test_resumes(tmp_path: Path, ranges: bool) -> None:
    told: list[int] = []
    with server(CONTENT, cut=300_000) as url, pytest.raises(MissingError, match=r"file\.deb.*it resumes"):
        fetch(wanted(url), tmp_path, told.append)
    assert (tmp_path / f"{SHA}.part").stat().st_size == 300_000
    with server(CONTENT, ranges=ranges) as url:
        assert fetch(wanted(url), tmp_path, ignore).read_bytes() == CONTENT


def test_the_next_mirror_when_one_forgot_it(tmp_path: Path) -> None:
    with server(b"", status=404) as first, server(CONTENT) as second:
        assert fetch(wanted(first, second), tmp_path, ignore).read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[::-1]])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with server(content) as url, pytest.raises(TamperedError, match="SHA-256 is not the pinned one"):
        fetch(wanted(url), tmp_path, ignore)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [CONTENT + b"more", CONTENT[:1000]])
def test_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    with server(content) as url, pytest.raises(MissingError, match=f"offers {len(content)} bytes instead of 1024000"):
        fetch(wanted(url), tmp_path, ignore)
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / SHA).write_bytes(CONTENT[::-1])
    with server(CONTENT) as url:
        assert fetch(wanted(url), tmp_path, ignore).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"x" * 1000, CONTENT[::-1], CONTENT + b"more"])
def test_a_damaged_part_is_started_anew(tmp_path: Path, part: bytes) -> None:
    (tmp_path / f"{SHA}.part").write_bytes(part)
    with server(CONTENT) as url:
        assert fetch(wanted(url), tmp_path, ignore).read_bytes() == CONTENT


def test_what_a_bad_mirror_began_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    page = b"<html>Log in to the hotel's network</html>"
    with server(page, ranges=False) as hotel, server(CONTENT[::-1], cut=1000) as bad, server(CONTENT) as good:
        assert fetch(wanted(hotel, bad, good), tmp_path, ignore).read_bytes() == CONTENT


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as caught:
        fetch(wanted("http://user:secret@127.0.0.1:1/file.deb"), tmp_path, ignore)
    line = caught.value.line()
    assert "file.deb: can't be downloaded (127.0.0.1:1: " in line
    assert "EDGEOPT_DEBIAN_MIRROR" in line
    assert "secret" not in line


def test_own_mirror_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEOPT_DEBIAN_MIRROR", "https://mirror.example/debian/")
    assert mirrors(("https://a",)) == ("https://mirror.example/debian", "https://a")
    monkeypatch.delenv("EDGEOPT_DEBIAN_MIRROR")
    assert mirrors(("https://a",)) == ("https://a",)
