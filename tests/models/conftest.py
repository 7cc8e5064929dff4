"""A hub and a download server on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``root/OWNER/NAME/FILE`` as the Hugging Face hub does, and ``root/files/FILE`` as a plain server."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if not (self.server.root / repo).is_dir():
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
            names = sorted(file.name for file in (self.server.root / repo).iterdir())
            if "/tree/" in path:
                found: object = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names]
            else:
                found = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self.reply(200, json.dumps(found).encode(), {}, with_body=with_body)
        repo, _, file = path.lstrip("/").partition("/resolve/")
        target = self.server.root / repo / file.partition("/")[2] if file else self.server.root / path.lstrip("/")
        if not target.is_file():
            code = "EntryNotFound" if (self.server.root / repo).is_dir() else "RepoNotFound"
            return self.reply(404, b"", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, with_body=with_body)
        body = target.read_bytes()
        etag = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, body, etag, with_body=with_body)

    def reply(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    root = tmp_path / "hub"
    root.mkdir()
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
