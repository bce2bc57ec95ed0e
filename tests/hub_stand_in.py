"""A hub on this machine: the HTTP requests that huggingface_hub makes to send and fetch models, with faults on demand.

One server in a thread. Files lie in memory by repository, branch and name; a request may be answered with a status
instead, or by a connection that is closed in the middle.
"""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from armour_surgery.hosts import hub_upload

__all__ = ["READS", "TOKEN", "Hub", "Repo", "point_at", "running"]

# It may do everything; READS may not write, and no other is known.
TOKEN, READS = "hf_writes", "hf_reads"
LICENSES = ("apache-2.0", "mit", "other")
Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits by branch, the newest last, each with all of its files."""

    private: bool = False
    kind: str = "model"
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: Files, message: str) -> str:
        """A commit with these files and nothing else."""
        commit = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches.setdefault(branch, []).append(commit)
        self.messages.append(message)
        return commit

    def find(self, revision: str) -> str | None:
        """The commit that a branch or a commit's id means."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> Files:
        """What a branch holds now, but for what each repository begins with."""
        return {name: content for name, content in self.commits[self.find(revision) or ""].items() if name[0] != "."}


@dataclass
class Hub:
    """What the server holds, and what happened: `requests` in their order, as `POST /api/repos/create`."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: Files = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[list[Any]] = field(default_factory=list)

    def make(self, name: str, *, kind: str = "model", private: bool = False, files: Files | None = None) -> Repo:
        repo = self.repos[name] = Repo(private, kind)
        repo.add("main", {".gitattributes": b"*.safetensors lfs\n", **(files or {})}, "initial commit")
        return repo

    def fail(self, part: str, how: int | str, times: int = 1) -> None:
        """Answer requests that have `part` in them with a status, or (`cut`) by closing the connection."""
        self.faults.append([part, how, times])

    def fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault[0] in request and fault[2] > 0:
                fault[2] -= 1
                return fault[1]
        return None

    def sent(self, part: str) -> list[str]:
        return [request for request in self.requests if part in request]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    # An answer's head and body are two writes, and Nagle's algorithm would keep the second one back for 40 ms.
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        size = int(self.headers.get("Content-Length") or 0)
        fault = self.hub.fault(request)
        if fault == "cut":
            # In the middle of what is sent, so that the other side is still writing.
            self.rfile.read(min(size, 1000))
            self.cut()
            return
        self.body = self.rfile.read(size)
        if isinstance(fault, int):
            self.answer(fault, {"error": f"made to answer {fault}"})
            return
        asked = path.strip("/").split("/")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, READS):
            self.answer(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif asked[:2] == ["lfs", "stored"]:
            self.hub.stored[asked[2]] = self.body
            self.answer(200, {})
        elif self.command == "POST" and asked[:2] != ["api", "validate-yaml"] and token != TOKEN:
            self.answer(403, {"error": "You don't have the rights to write there"})
        else:
            self.route(asked)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, asked: list[str]) -> None:
        if asked == ["api", "repos", "create"]:
            self.create()
        elif asked == ["api", "validate-yaml"]:
            self.validate()
        elif asked[0] == "api":
            kind, name, rest = asked[1].rstrip("s"), "/".join(asked[2:4]), asked[4:]
            repo = self.hub.repos.get(name)
            if repo is None or repo.kind != kind:
                self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            else:
                self.route_in(name, repo, rest)
        elif asked[-3:] == ["lfs", "objects", "batch"]:
            self.batch()
        else:
            self.resolve("/".join(asked[:2]), asked[3], "/".join(asked[4:]))

    def route_in(self, name: str, repo: Repo, rest: list[str]) -> None:
        verb, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        commit = repo.find(revision)
        if verb == "branch":
            repo.branches[revision] = list(repo.branches["main"])
            self.answer(200, {})
        elif commit is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            files = [{"rfilename": file} for file in repo.commits[commit]]
            self.answer(200, {"id": name, "sha": commit, "private": repo.private, "siblings": files})
        elif verb == "tree":
            self.answer(200, [_entry(file, content) for file, content in repo.commits[commit].items()])
        elif verb == "preupload":
            self.preupload(repo.commits[commit])
        else:
            self.commit(name, repo, revision, repo.commits[commit])

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.make(name, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.answer_if_heard("creation", {"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        content: str = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---") else {}
        # A card may name none, and none that there is not.
        if metadata.get("license", LICENSES[0]) not in LICENSES:
            said = f'"license" must be one of [{", ".join(LICENSES)}]'
            self.answer(400, {"errors": [{"message": said}], "warnings": []})
        else:
            self.answer(200, {"errors": [], "warnings": [{"message": "there could be more"}]})

    def preupload(self, there: Files) -> None:
        answers = []
        ignored = there.get(".gitignore", b"").decode().split()
        for file in json.loads(self.body)["files"]:
            content = there.get(file["path"])
            large = file["path"].endswith((".safetensors", ".png"))
            oid = None if content is None else _sha256(content) if large else _git_hash(content)
            mode = "lfs" if large else "regular"
            answers.append(
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in ignored, "oid": oid}
            )
        self.answer(200, {"files": answers})

    def batch(self) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.stored:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/stored/{wanted['oid']}?signature=secret"}}
            objects.append(wanted)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, repo: Repo, branch: str, there: Files) -> None:
        files, message = dict(there), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.stored[value["oid"]]
        oid = repo.add(branch, files, message)
        done = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        self.answer_if_heard("commit", done)

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and "Authorization" not in self.headers):
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        commit = repo.find(revision)
        if commit is None:
            self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif file not in repo.commits[commit]:
            self.answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            content = repo.commits[commit][file]
            self.answer(200, content, {"X-Repo-Commit": commit, "ETag": f'"{_sha256(content)}"'})

    def answer_if_heard(self, what: str, content: Any) -> None:
        """It is done, and with the fault `answer to the WHAT` nobody hears of it."""
        if self.hub.fault(f"answer to the {what}"):
            self.cut()
        else:
            self.answer(200, content)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _git_hash(content)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at its `url`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_at(url: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub in this process talk to a hub, with a token, a cache of its own, and no time to wait."""
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    # hf_xet talks to a store of chunks, which is not here.
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (_http, file_download):
        patch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    patch.setattr(hub_upload, "WAITS", (0.0, 0.0, 0.0))
    patch.setenv("HF_TOKEN", TOKEN)
