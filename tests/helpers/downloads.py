"""A local web server, and a simulated lack of network."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        content = source.read()
        # A file with this name is truncated.
        outputfile.write(content[: len(content) // 2] if "broken" in self.path else content)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder's files, and return the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every host name lookup fail."""

    def find_no_address(*_: Any, **__: Any) -> None:
        raise socket.gaierror("there is no network here")

    monkeypatch.setattr(socket, "getaddrinfo", find_no_address)
