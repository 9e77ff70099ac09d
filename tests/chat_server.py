"""An OpenAI-compatible endpoint on this machine that answers, or misbehaves, as a test scripts it."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass
class Reply:
    """What a request is answered with: a text, else an object, else bytes."""

    text: str | None = None
    content: Any = None
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish: str = "stop"
    tokens: int | None = 100
    delay: float = 0.0  # seconds before the status
    drip: float = 0.0  # seconds between two bytes of the body
    cut: bool = False  # close the connection within the body

    def encoded(self) -> bytes:
        if self.text is None and self.content is None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        whole: dict[str, Any] = {"choices": [{"message": message, "finish_reason": self.finish}]}
        if self.tokens is not None:
            whole["usage"] = {"total_tokens": self.tokens}
        return json.dumps(whole if self.content is None else self.content).encode()


class ChatServer:
    """`with ChatServer(reply) as server:`; `reply` makes the answer of the request that was added to `requests`."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply | str]) -> None:
        self.requests: list[dict[str, Any]] = []  # their objects
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(request)
                server.headers.append(dict(self.headers))
                server.paths.append(self.path)
                answer = reply(request)
                self._send(Reply(answer) if isinstance(answer, str) else answer)

            def _send(self, answer: Reply) -> None:
                body = answer.encoded()
                time.sleep(answer.delay)
                self.send_response(answer.status)
                for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                body = body[: len(body) // 2] if answer.cut else body
                step = 1 if answer.drip else max(1, len(body))
                for start in range(0, len(body), step):
                    self.wfile.write(body[start : start + step])
                    time.sleep(answer.drip)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None:  # a client that has gone
                pass

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]
