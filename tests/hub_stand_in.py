"""A server on this machine that stands in for the Hugging Face hub. The real one was not tried."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "1234567890" * 4


class Host(BaseHTTPRequestHandler):
    """What huggingface_hub asks of one repository, me/mirror, and plain files; in parts, too."""

    files: dict[str, bytes]
    port = 0
    cut = ""  # a file whose first answer stops in the middle
    asked: list[tuple[str, str]]

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.split("?")[0]
        if re.match("/api/(datasets|models)/me/mirror/tree/", path):
            listed = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
            return self.send(200, json.dumps(listed).encode(), body, {})
        if re.match("/api/(datasets|models)/me/mirror", path):
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.files.items()]
            about = {"id": "me/mirror", "sha": SHA, "siblings": siblings, "private": False}
            about |= {"cardData": {"license": "cc-by-4.0"}, "tags": [], "downloads": 0}
            return self.send(200, json.dumps(about).encode(), body, {})
        name = re.sub(r"^/((datasets/)?me/mirror/resolve/[^/]+/|plain/)", "", path)
        if name not in self.files:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        content, start = self.files[name], 0
        if found := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
        if body:
            type(self).asked.append((name, self.headers.get("Range", "")))
        digest = hashlib.sha256(content).hexdigest()
        head = {"ETag": f'"{digest}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if start:
            head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(206 if start else 200, content[start:], body, head, name)

    def send(self, status, content, body, head, name=""):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | head).items():
            self.send_header(key, value)
        self.end_headers()
        if body and name and name == self.cut:
            type(self).cut = ""
            content = content[: len(content) // 2]
            self.close_connection = True
        if body:
            self.wfile.write(content)


@contextmanager
def serving() -> Iterator[None]:
    """Serve `Host.files` on `Host.port` until the end of the block."""
    Host.cut, Host.asked = "", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    Host.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()


def environment(address: str, home: Path) -> dict[str, str]:
    """The variables by which a process of its own takes the server for the hub."""
    own = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    return own | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}


def constants_of(port: int, home: Path) -> dict[str, object]:
    """What huggingface_hub reads from its environment when it is imported."""
    address = f"http://127.0.0.1:{port}"
    return {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }
