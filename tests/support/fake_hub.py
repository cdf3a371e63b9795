"""A server that speaks as much of the hub's API as huggingface_hub calls to push a folder."""

import base64
import contextlib
import hashlib
import importlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@contextlib.contextmanager
def fake_hub(monkeypatch):
    """Yields a server that the client of the hub sends to."""
    server = FakeHub()
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


class FakeHub(ThreadingHTTPServer):
    """repos: by id, whether it is private. branches: by id. files: by id and branch, their contents.

    of_others: ids that the token may not write to. tokens: that requests came with.
    messages: of the commits.
    fails: part of a path that is answered with `status` and `fault`, so many `times`; None: always.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.branches, self.files = {}, {}, {}
        self.objects, self.tokens, self.messages, self.of_others = {}, set(), [], set()
        self.fails, self.status, self.fault, self.times = None, 400, "the hub is full", None
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, content: object = None, code: int = 200) -> None:
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status: int | str, fault: object) -> None:
        """Answer with a status, or `drop` the connection, or be `silent` until the server is."""
        if status == "silent":
            self.server.over.wait(60)
        if isinstance(status, str):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.answer({"error": fault} if isinstance(fault, str) else fault, status)

    def do(self) -> None:
        hub, size = self.server, int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while count := int(self.rfile.readline(), 16):
                body += self.rfile.read(count)
                self.rfile.readline()
            self.rfile.readline()
        hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if hub.fails is not None and hub.fails in path and hub.times != 0:
            hub.times = None if hub.times is None else hub.times - 1
            self.fail(hub.status, hub.fault)
        elif path == "/api/whoami-v2":
            self.answer({"name": "me", "type": "user", "orgs": [], "auth": {}})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repos:
                self.answer({"error": "exists", "url": f"{hub.address}/{name}"}, 409)
                return
            hub.repos[name] = asked.get("private", asked.get("visibility") == "private")
            hub.branches[name] = {"main"}
            self.answer({"url": f"{hub.address}/{name}", "id": name, "name": name})
        elif path.startswith("/objects/"):
            hub.objects[path.rpartition("/")[2]] = body
            self.answer({})
        else:
            self.of_repo(path, body)

    def of_repo(self, path: str, body: bytes) -> None:
        hub, parts = self.server, path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        if rest[:1] == ["branch"]:
            hub.branches[name].add("/".join(rest[1:]))
            self.answer({})
        elif rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs"
                    if each["path"].endswith((".safetensors", ".pt"))
                    else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in files
            ]
            self.answer({"files": modes})
        elif rest[:3] == ["info", "lfs", "objects"]:
            asked = json.loads(body)["objects"]
            places = [
                each | {"actions": {"upload": {"href": f"{hub.address}/objects/{each['oid']}"}}}
                for each in asked
            ]
            self.answer({"transfer": "basic", "objects": places})
        elif rest[:1] == ["commit"]:
            self.commit(name, "/".join(rest[1:]), body)
        elif rest[:1] == ["tree"]:
            known = hub.files.get((name, "/".join(rest[1:])), {})
            entries = ({"path": path, "size": len(known[path])} for path in known)
            self.answer([{"type": "file", "oid": "2" * 40, **each} for each in entries])
        elif not rest or rest[0] == "revision":
            private = bool(hub.repos.get(name))
            self.answer({"id": name, "sha": "0" * 40, "siblings": [], "private": private})
        elif rest[:1] == ["auth-check"]:
            self.answer({}, 403 if name in hub.of_others else 200)
        else:
            self.answer({"error": f"no {path}"}, 404)

    def commit(self, name: str, branch: str, body: bytes) -> None:
        hub = self.server
        files = hub.files.setdefault((name, branch), {})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "lfsFile":
                content = hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        self.answer(
            {
                "success": True,
                "commitOid": "1" * 40,
                "commitUrl": f"{hub.address}/{name}/commit/{'1' * 40}",
                "hookOutput": "",
            }
        )

    do_GET = do_POST = do_PUT = do_HEAD = do  # noqa: N815
