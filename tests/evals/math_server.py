"""A server of OpenAI's API for tests: it adds two numbers, and is right with even seeds only."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Served:
    """What the server was asked; ``failures`` are status codes it gives before it answers."""

    url: str = ""
    failures: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    usage: bool = True
    reasoning: str = ""


@contextmanager
def serving() -> Iterator[Served]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *told: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "adder"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.keys.append(self.headers.get("Authorization"))
            if served.failures:
                code = served.failures.pop(0)
                self.reply(code, {"error": f"no luck ({code})"})
                return
            served.bodies.append(body)
            served.paths.append(self.path)
            self.reply(200, answer(body, served))

        def reply(self, code: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(body: dict[str, Any], served: Served) -> dict[str, Any]:
    right = body["seed"] % 2 == 0
    cut = body["max_tokens"] < 5
    told = {"finish_reason": "length" if cut else "stop", "index": 0}
    if "prompt" in body:
        told["text"] = f"{len(body['prompt'])} tokens"
    else:
        asked = next(m["content"] for m in body["messages"] if m["role"] == "user")
        one, other = re.findall(r"\d+", asked)[:2]
        total = int(one) + int(other) + (0 if right else 1)
        said = "So it is" if cut else f"I add, which gives \\boxed{{{total}}}."
        told["message"] = {"role": "assistant", "content": said}
        if served.reasoning:
            told["message"]["reasoning_content"] = served.reasoning
    found: dict[str, Any] = {"choices": [told]}
    if served.usage:
        found["usage"] = {"completion_tokens": 4 if cut else 9}
    return found
