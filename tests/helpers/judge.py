"""A judge's server that answers in text, over OpenAI's chat API and Anthropic's messages."""

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | int | tuple[str, str]


class TextServer:
    """`reply(conversation, n)` is what it says to a conversation (its messages) that is asked for the n-th time: a
    text, a text and a finish_reason, or the status of an error."""

    def __init__(self, reply: Callable[[list[dict[str, str]], int], Answer]):
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        owner, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = json.dumps([body.get("system"), body["messages"]])
                with lock:
                    owner.asked[key] += 1
                    owner.requests.append(body)
                    n = owner.asked[key]
                answer = reply(body["messages"], n)
                if isinstance(answer, int):
                    return self.send(answer, {"error": {"message": f"fault {answer}"}})
                text, reason = (answer, "stop") if isinstance(answer, str) else answer
                if self.path.endswith("/messages"):
                    return self.send(200, message(text, reason))
                return self.send(200, completion(text, reason))

            def send(self, status, content):
                data = json.dumps(content).encode()
                with contextlib.suppress(OSError):  # the client was killed
                    self.send_response(status)
                    for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{server.server_address[1]}"
        self.url = f"{self.host}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    @property
    def calls(self) -> int:
        return sum(self.asked.values())


def completion(text: str, reason: str) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}, "logprobs": None}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice], "usage": usage,
    }  # fmt: skip


def message(text: str, reason: str) -> dict[str, Any]:
    return {
        "id": "x", "type": "message", "role": "assistant", "model": "served", "stop_sequence": None,
        "stop_reason": "max_tokens" if reason == "length" else "end_turn",
        "usage": {"input_tokens": 9, "output_tokens": 9}, "content": [{"type": "text", "text": text}],
    }  # fmt: skip
