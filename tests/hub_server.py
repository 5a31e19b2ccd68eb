"""A model hub on loopback, as far as huggingface_hub's own client asks for it: repositories, LFS, commits, downloads.

with FakeHub() as hub:
    hub.address, hub.repositories["me/model"].files["README.md"]
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

WRITER, READER = "hf_writer", "hf_reader"  # tokens
LICENSES = ("apache-2.0", "mit")
COMMIT = "c0ffee" + 34 * "0"


@dataclass
class Repository:
    """What was committed, and how."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    by_lfs: set[str] = field(default_factory=set)


class FakeHub:
    """Serves from a thread; `requests` has each request's method and path."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def written(self) -> list[str]:
        """The requests that change something."""
        return [each for each in self.requests if not each.startswith(("GET", "HEAD"))]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        changes = self.command in ("POST", "PUT") and "/upload/" not in path
        if changes and token not in (WRITER, READER):
            return self._fail(401, "Invalid username or password.")
        if changes and token == READER:
            return self._fail(403, "You don't have the rights to write here")
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {path}")
            if found:
                return method(self, body, *found.groups())
        return self._fail(404, "Entry not found", code="EntryNotFound")

    # ---- what can be asked

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "You already created this model repo", **url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.hub.repositories[name] = Repository(private)
        return self._answer(200, url)

    def info(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            siblings = [{"rfilename": path} for path in repository.files]
            self._answer(200, {"id": name, "private": repository.private, "sha": COMMIT, "siblings": siblings})

    def validate(self, body: bytes) -> None:
        _, head, _ = json.loads(body)["content"].split("---\n", 2)
        license = yaml.safe_load(head).get("license", LICENSES[0])
        wrong = [] if license in LICENSES else [{"message": f'"license" must be one of {", ".join(LICENSES)}'}]
        self._answer(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def preupload(self, body: bytes, name: str) -> None:
        if self._repository(name) is not None:
            modes = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": each["path"],
                    "uploadMode": modes[each["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {
                    "upload": {"href": f"{self.hub.address}/upload/{each['oid']}"},
                    "verify": {"href": f"{self.hub.address}/verify"},
                },
            }
            for each in json.loads(body)["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer(200, {})

    def verify(self, body: bytes) -> None:
        asked = json.loads(body)
        assert len(self.hub.objects[asked["oid"]]) == asked["size"]
        self._answer(200, {})

    def commit(self, body: bytes, name: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        for line in body.splitlines():
            entry: dict[str, Any] = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                repository.messages.append(value["summary"])
            elif entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile", entry["key"]
                repository.files[value["path"]] = self.hub.objects[value["oid"]]
                repository.by_lfs.add(value["path"])
        self._answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repository = self._repository(name)
        if repository is None:
            pass
        elif path not in repository.files:
            self._fail(404, "Entry not found", code="EntryNotFound")
        else:
            content = repository.files[path]
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    # ---- how it is answered

    def _repository(self, name: str) -> Repository | None:
        if name not in self.hub.repositories:
            self._fail(404, "Repository not found", code="RepoNotFound")
        return self.hub.repositories.get(name)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, message: str, code: str = "") -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers | ({"X-Error-Code": code} if code else {}))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST /api/repos/create", _Handler.create),
    ("POST /api/validate-yaml", _Handler.validate),
    (f"POST /api/models/{NAME}/preupload/main", _Handler.preupload),
    (f"POST /api/models/{NAME}/commit/main", _Handler.commit),
    (f"GET /api/models/{NAME}(?:/revision/main)?", _Handler.info),
    (f"POST /{NAME}\\.git/info/lfs/objects/batch", _Handler.batch),
    (r"PUT /upload/(\w+)", _Handler.upload),
    ("POST /verify", _Handler.verify),
    (f"(?:GET|HEAD) /{NAME}/resolve/[^/]+/(.+)", _Handler.resolve),
)
