"""A server with the OpenAI API on this machine, which can misbehave in the ways that servers do."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "served"


class Server:
    """Answers completions and chats. Set `answer` to misbehave.

    answer: called with the body of a request; gives the text of its completion, or a `Reply`.
    asked: the bodies, in the order in which they came. most: requests that were there at a time.
    """

    def __init__(self) -> None:
        self.answer: Callable[[dict], str | Reply] = lambda body: f"text {body['seed'] % 1000}"
        self.models: list[str] | None = [MODEL]
        self.asked: list[dict] = []
        self.keys: set[str] = set()
        self.now, self.most = 0, 0
        self.lock = threading.Lock()
        self.url = ""


class Reply:
    """What is sent in place of a completion.

    cut: bytes that are missing at the end, after which the connection is closed.
    """

    def __init__(
        self, status: int, body: Any, cut: int = 0, kind: str = "application/json"
    ) -> None:
        self.status, self.cut, self.kind = status, cut, kind
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def refusal(status: int, message: str, code: str | None = None) -> Reply:
    return Reply(status, {"error": {"message": message, "type": "error", "code": code}})


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port, until the block ends."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            if server.models is None:
                self.reply(refusal(404, "no list of models"))
            else:
                listed = [{"id": name, "object": "model"} for name in server.models]
                self.reply(Reply(200, {"object": "list", "data": listed}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.asked.append(body)
                server.keys.add(self.headers["Authorization"])
                server.now += 1
                server.most = max(server.most, server.now)
            try:
                found = server.answer(body)
            finally:
                with server.lock:
                    server.now -= 1
            self.reply(found if isinstance(found, Reply) else Reply(200, self.completion(found)))

        def completion(self, text: str) -> dict:
            choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
            chat = self.path.endswith("/chat/completions")
            choice |= (
                {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            )
            kind = "chat.completion" if chat else "text_completion"
            whole = {"id": "1", "object": kind, "created": 0, "model": MODEL, "choices": [choice]}
            return whole | {
                "usage": {"completion_tokens": 2, "prompt_tokens": 1, "total_tokens": 3}
            }

        def reply(self, reply: Reply) -> None:
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.kind)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # who asked may have gone away
                self.wfile.write(reply.body[: len(reply.body) - reply.cut])
                self.wfile.flush()
            self.close_connection = self.close_connection or bool(reply.cut)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        threading.Thread(target=http.serve_forever, args=[0.02], daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()


def slowly(seconds: float) -> Callable[[dict], str]:
    def answer(body: dict) -> str:
        time.sleep(seconds)
        return "late"

    return answer
