"""A Hugging Face Hub on loopback, with what its client asks for to download a data set."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(repo: str, files: Mapping[str, bytes], *, revision: str) -> Iterator[str]:
    """Serves one data set at one revision; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith("/api/datasets/"):
                self._api(path.removeprefix("/api/datasets/"))
                return
            name = path.removeprefix(f"/datasets/{repo}/resolve/{COMMIT}/")
            if name not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            tag = hashlib.sha256(files[name]).hexdigest()
            self._send(200, files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def _api(self, path: str) -> None:
            if not path.startswith(repo):
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif path == f"{repo}/revision/{revision}":
                names = [{"rfilename": name} for name in files]
                body = {"id": repo, "sha": COMMIT, "siblings": names}
                self._send(200, json.dumps(body).encode())
            elif path in (f"{repo}/tree/{COMMIT}", f"{repo}/tree/{revision}"):
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in files.items()
                ]
                self._send(200, json.dumps(tree).encode())
            else:
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
