"""A small Hub on this machine: the endpoints that `huggingface_hub` calls to upload a model and to load it.

Point a process at it with `HF_ENDPOINT`; the client in it is the real one. Every file travels inside its commit. Large
files, tokens, and uploads that break off are between the client and the Hub: nothing in this package has a part in them.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import ModelCard


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    is_private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        oid = hashlib.sha1(f"{branch} {len(self.branches[branch])} {title}".encode()).hexdigest()
        self.branches[branch].append(Commit(oid, title, files))
        return self.branches[branch][-1]

    def resolve(self, revision: str) -> Commit | None:
        """The last commit of a branch, or the one of this id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        commits = (commit for branch in self.branches.values() for commit in branch)
        return next((commit for commit in commits if commit.oid == revision), None)


class HubServer:
    """The Hub of one test module; a context manager that serves while it is open.

    Attributes:
        repos: by id.
        unknown: method and path of what no endpoint answers; a test asserts that there is none.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.unknown: list[tuple[str, str]] = []

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes]) -> Repo:
        """A repository that is there already."""
        repo = self.repos[repo_id] = Repo()
        repo.add("main", "initial commit", files)
        return repo


class NotThere(Exception):
    """An answer of 404, with the Hub's word for what is missing."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/agent-harnesses", "nothing"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/repos/create", "create"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<name>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    ]

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        method = "GET" if self.command == "HEAD" else self.command
        self.body = self._read_body()
        for wanted, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                try:
                    return getattr(self, name)(**arguments)
                except NotThere as missing:
                    return self.send({"error": str(missing)}, 404, {"X-Error-Code": str(missing)})
        self.hub.unknown.append((self.command, self.path))
        return self.send({"error": "no such endpoint"}, 404)

    do_GET = do_HEAD = do_POST = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, content, status: int = 200, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def find(self, repo: str, revision: str | None = None) -> tuple[Repo, Commit]:
        if repo not in self.hub.repos:
            raise NotThere("RepoNotFound")
        found = self.hub.repos[repo]
        commit = found.resolve(revision or "main")
        if commit is None:
            raise NotThere("RevisionNotFound")
        return found, commit

    def whoami(self) -> None:
        self.send({"type": "user", "name": "ada", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def nothing(self) -> None:
        raise NotThere("EntryNotFound")

    def validate(self) -> None:
        self.send({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.add(repo_id, {}).is_private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.send({"url": f"{self.hub.url}/{repo_id}", "name": repo_id}, 409 if exists else 200)

    def info(self, repo: str, revision: str | None = None) -> None:
        _, commit = self.find(repo, revision)
        card = ModelCard(commit.files.get("README.md", b"").decode()).data.to_dict()
        shown = {name: card[name] for name in ("pipeline_tag", "library_name", "model-index") if name in card}
        siblings = [{"rfilename": path} for path in commit.files]
        self.send(
            {
                "id": repo,
                "sha": commit.oid,
                "siblings": siblings,
                "cardData": card,
                "tags": card.get("tags", []),
                **shown,
            }
        )

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        files = self.find(repo, revision)[1].files
        inside = [name for name in files if path is None or name.startswith(f"{path}/")]
        self.send([{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in inside])

    def branch(self, repo: str, name: str) -> None:
        found, start = self.find(repo)
        is_new = name not in found.branches
        found.branches.setdefault(name, [start])
        self.send({}, 200 if is_new else 409)

    def preupload(self, repo: str, revision: str) -> None:
        asked = json.loads(self.body)["files"]
        self.send(
            {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
        )

    def commit(self, repo: str, revision: str) -> None:
        found, before = self.find(repo, revision)
        files, title = dict(before.files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                title = entry["value"]["summary"]
            elif entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            else:
                raise AssertionError(f"the client sent {entry['key']}")
        commit = found.add(revision, title, files)
        self.send(
            {"success": True, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit.oid}", "commitOid": commit.oid}
        )

    def download(self, repo: str, revision: str, path: str) -> None:
        _, commit = self.find(repo, revision)
        if path not in commit.files:
            raise NotThere("EntryNotFound")
        content = commit.files[path]
        self.send(content, headers={"X-Repo-Commit": commit.oid, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
