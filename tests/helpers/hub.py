"""A server on this machine that takes commits as the hub does."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Hub(ThreadingHTTPServer):
    """Takes the files of a commit as the hub does where they are small: in base64, a line of JSON each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
        self.fails = False  # at its next commit, once
        self.tokens: set[str | None] = set()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        hub, path = self.server, urlsplit(self.path).path
        hub.tokens.add(self.headers.get("Authorization"))
        body = self.body()
        answer: dict[str, object] = {}
        if path == "/api/repos/create":
            hub.created = json.loads(body)
            answer = {"url": f"{hub.url}/lab/mine"}
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif "/commit/" in path and hub.fails:
            hub.fails = False
            self.reply({"error": "the commit is refused"}, 403)
            return
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": f"{hub.url}/lab/mine/commit/{'0' * 40}", "commitOid": "0" * 40}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        self.reply(answer)

    def do_GET(self) -> None:
        self.reply({})

    def body(self) -> bytes:
        if length := self.headers.get("Content-Length"):
            return self.rfile.read(int(length))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, answer: dict[str, object], status: int = 200) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
