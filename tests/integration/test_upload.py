"""The page's command puts a policy on the hub: hf itself, against a server on this machine that takes commits."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from tests.helpers.tiny import ROOT, save_tiny


class Hub(ThreadingHTTPServer):
    """Takes the files of a commit as the hub does where they are small: in base64, a line of JSON each."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created: dict[str, str] = {}
        self.files: dict[str, bytes] = {}
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

    def reply(self, answer: dict[str, object]) -> None:
        raw = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


def test_the_command_of_the_page_uploads_a_policy_privately(tmp_path):
    (command,) = re.findall(r"^hf (upload .*)$", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
    policy = Path(save_tiny(tmp_path / "policy"))
    words = shlex.split(command.replace("YOU/NAME", "lab/mine").replace("runs/RUN/policy", str(policy)))
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "of-a-test", "NO_PROXY": "127.0.0.1"}
    program = str(Path(sys.executable).with_name("hf"))
    process = subprocess.run([program, *words], env=os.environ | environment, capture_output=True, text=True)
    hub.shutdown()
    hub.server_close()
    assert process.returncode == 0, process.stdout + process.stderr
    assert (hub.created["name"], hub.created["visibility"]) == ("mine", "private")
    assert hub.files == {file.name: file.read_bytes() for file in policy.iterdir()}
    assert {"config.json", "model.safetensors"} <= hub.files.keys()
    assert hub.tokens == {"Bearer of-a-test"}
