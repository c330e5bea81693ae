"""A server of OpenAI's completions API on a real model of transformers, with the extensions of vLLM that prefopt reads.

    python tests/helpers/openai_server.py MODEL PORT [FAULT]

FAULT: `text` (it gives no token ids), `no_logprobs`, `other_ids` (it tokenizes anew), `garbage` (JSON of another kind),
`html`, `refuses` (400), `hangs`, or `dies` (SIGKILL at the third request for a response).
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class OpenAIServer:
    """It listens from the moment on that it is made. `requests`: the bodies of the requests, in their order."""

    def __init__(self, folder: str, port: int = 0, fault: str = "none", seconds: float = 0.0):
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.folder, self.fault, self.seconds = folder, fault, seconds
        self.requests: list[dict[str, Any]] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.send(200, {"object": "list", "data": [{"id": owner.folder, "object": "model"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.requests.append(body)
                    owner.running += 1
                    owner.most_running = max(owner.most_running, owner.running)
                try:
                    time.sleep(owner.seconds)
                    self.send(*owner.answer(body))
                finally:
                    with owner.lock:
                        owner.running -= 1

            def send(self, status, content):
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def drawn(self) -> int:
        return sum("logprobs" not in body for body in self.requests)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        if "logprobs" not in body:  # a request for a response, and not for a check
            if self.fault == "dies" and self.drawn() >= 3:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hangs":
                time.sleep(3600)
            if self.fault == "garbage":
                return 200, {"choices": [{"index": 0, "text": None}]}
            if self.fault == "html":
                return 200, "<html>busy</html>"
            if self.fault == "refuses":
                return 400, {"error": {"message": "the prompt is longer than this model reads"}}
        with self.lock:
            return 200, self.complete(body)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = list(body["prompt"])
        if self.fault == "other_ids":
            ids = self.tokenizer("as it reads this").input_ids
        stops = {self.tokenizer.eos_token_id, *body.get("stop_token_ids", [])}
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        tokens, values = list[int](), list[float]()
        while len(tokens) < body["max_tokens"] and not stops & {*tokens[-1:]}:
            logps = self.model(torch.tensor([ids + tokens])).logits[0, -1].float().log_softmax(-1)
            if body["temperature"]:
                ps = (logps / body["temperature"]).softmax(-1)
                tokens.append(int(ps.multinomial(1, generator=generator)))
            else:
                tokens.append(int(logps.argmax()))
            values.append(float(logps[tokens[-1]]))
        choice: dict[str, Any] = {
            "index": 0,
            "text": self.tokenizer.decode(tokens, skip_special_tokens=True),
            "finish_reason": "stop" if tokens[-1] in stops else "length",
            "logprobs": None,
        }
        if body.get("logprobs") is not None and self.fault != "no_logprobs":
            names = self.tokenizer.convert_ids_to_tokens(tokens)
            choice["logprobs"] = {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": []}
        if body.get("return_token_ids") and self.fault != "text":
            choice |= {"token_ids": tokens, "prompt_token_ids": ids}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids + tokens)}
        names = {"id": "x", "object": "text_completion", "created": 0, "model": self.folder}
        return names | {"choices": [choice], "usage": usage}


if __name__ == "__main__":
    print(OpenAIServer(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]).url, flush=True)
    threading.Event().wait()
