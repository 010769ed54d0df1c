"""A model hub on this machine: as much of its protocol as a download needs, and the faults that downloads meet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"


class Hub:
    """Serves the files of ``folder`` as the models ``<owner>/...``, whatever they are called.

    Attributes:
        url: for ``HF_ENDPOINT``.
        cut: so many bytes of the weights are sent, then the connection is closed; None sends all.
        once: the same, for the next request alone.
        claimed: the size that the weights are said to have; None for the true one.
        asked: (method, file, range) of every request for a file.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        self.folder, self.owner = folder, owner
        self.cut: int | None = None
        self.once: int | None = None
        self.claimed: int | None = None
        self.asked: list[tuple[str, str, str | None]] = []
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.hub = hub
                super().__init__(*args)

        self._handler = Handler
        self._open(0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _open(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Refuse all connections in this block."""
        port = self._server.server_port
        self.close()
        yield
        self._open(port)

    def close(self) -> None:
        """Stop serving; who asks from now on is refused the connection."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def etag(self, path: Path) -> str:
        """Return what a file is known by: a hash of what it holds."""
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @property
    def commit(self) -> str:
        """Return what the model's state is known by."""
        files = sorted(path for path in self.folder.iterdir())
        return hashlib.sha1("".join(map(self.etag, files)).encode()).hexdigest()


@contextlib.contextmanager
def hub(folder: Path, owner: str = "tiny") -> Iterator[Hub]:
    """Yield a :class:`Hub` that is closed afterwards."""
    server = Hub(folder, owner)
    try:
        yield server
    finally:
        server.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.hub
        place = re.escape(hub.owner) + "/[^/]+"
        match = re.fullmatch(rf"/{place}/resolve/[^/]+/([^?]+)(\?.*)?", self.path)
        model = re.fullmatch(rf"/api/models/({place})(\?.*)?", self.path)
        if model is not None:
            files = [{"rfilename": path.name} for path in sorted(hub.folder.iterdir())]
            self._json({"id": model[1], "sha": hub.commit, "tags": [], "siblings": files})
            return
        if match is None:
            self._nothing("EntryNotFound" if f"/{hub.owner}/" in self.path else "RepoNotFound")
            return
        path = hub.folder / match[1]
        asked = self.headers.get("Range")
        hub.asked.append((self.command, match[1], asked))
        if not path.is_file():
            self._nothing("EntryNotFound")
            return
        content = path.read_bytes()
        weights = match[1] == WEIGHTS
        begin = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        size = hub.claimed if weights and hub.claimed is not None else len(content)
        self.send_response(206 if begin else 200)
        self._common()
        self.send_header("ETag", f'"{hub.etag(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - begin))
        self.end_headers()
        if not body:
            return
        part = content[begin:size]
        cut = hub.cut
        if weights and hub.once is not None:
            cut, hub.once = hub.once, None
        if weights and cut is not None:
            part = part[: max(cut - begin, 0)]
        with contextlib.suppress(OSError):
            self.wfile.write(part)
        self.close_connection = self.close_connection or len(part) < size - begin

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _nothing(self, code: str) -> None:
        self.send_response(404)
        self._common()
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _common(self) -> None:
        self.send_header("X-Repo-Commit", self.hub.commit)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: standard error is for what is tested."""


def impatient() -> None:
    """Let this process try again at once where huggingface_hub would wait; its tries are as many."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    class Quick:
        @staticmethod
        def sleep(seconds: float) -> None:
            """Go on at once."""

        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

    modules: tuple[Any, ...] = (file_download, _http)
    for module in modules:
        module.time = Quick()


def offline() -> None:
    """Do in this process as if it had been started with ``HF_HUB_OFFLINE=1``."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
