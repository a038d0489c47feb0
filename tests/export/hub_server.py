"""As much of the Hugging Face hub as an upload and a download use, on this machine."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT, TOKEN = "c" * 40, "hf_test"


class Hub(ThreadingHTTPServer):
    """One repository.

    Attributes:
        files: what was committed, by path.
        stored: what was put into the storage for large files, by SHA-256.
        asked: method and path of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.made: dict = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers while the context lasts."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, content: bytes | dict, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        self.server.asked.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_POST(self) -> None:
        body, path, hub = self.body(), self.path, self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid user token."}, 401)
        if path == "/api/repos/create":
            hub.made = json.loads(body)
            return self.answer({"url": f"{hub.address}/me/net"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/models/me/net/preupload/main":
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [(name, "lfs" if name.endswith(".safetensors") else "regular") for name in files]
            return self.answer({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes]})
        if path == "/me/net.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{hub.address}/storage/{each['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        if path == "/api/models/me/net/commit/main":
            for line in map(json.loads, body.splitlines()):
                self.commit(line["key"], line["value"])
            return self.answer({"commitUrl": f"{hub.address}/me/net/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer({"error": "unknown"}, 404)

    def commit(self, kind: str, value: dict) -> None:
        if kind == "file":
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        elif kind == "lfsFile":
            self.server.files[value["path"]] = self.server.stored[value["oid"]]

    def do_PUT(self) -> None:
        body = self.body()
        assert self.path == f"/storage/{hashlib.sha256(body).hexdigest()}"
        self.server.stored[self.path.rpartition("/")[2]] = body
        self.answer(b"")

    def do_GET(self) -> None:
        self.body()
        hub, (place, _, name) = self.server, self.path.rpartition("/")
        if place == "/api/models/me/net/revision":
            return self.answer({"id": "me/net", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]})
        if self.path.startswith("/api/models/me/net/tree/"):
            files = [{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in hub.files.items()]
            return self.answer(json.dumps(files).encode())
        if place in ("/me/net/resolve/main", f"/me/net/resolve/{COMMIT}") and name in hub.files:
            tag = hashlib.sha256(hub.files[name]).hexdigest()
            return self.answer(hub.files[name], ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        return self.answer({"error": "unknown"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET
