"""A small Hub on this machine: the HTTP endpoints that `huggingface_hub` calls for models, and nothing of its client.

Point a process at it with `HF_ENDPOINT`; the client in it is the real one. As on the Hub, a commit is all or nothing,
large files travel apart from it (LFS, in one part or several), are served from another host, and are kept by their
sha256; a private repository does not exist for whoever may not see it; metadata that the Hub would refuse is refused.
"""

import base64
import fnmatch
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml


LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.png", "*.arrow", "*.gz", "*.zip")
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c
ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 gemma unknown other
"""
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")


@dataclass(frozen=True)
class File:
    """`oid`: of git's blob; `sha256`: of a large file, whose bytes are in `HubServer.large`."""

    oid: str
    size: int
    content: bytes | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    id: str
    is_private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        names = {**self.commits, **self.pull_requests, **self.tags, **self.branches}
        found = names.get(revision)
        return self.commits.get(found) if isinstance(found, str) else found

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.branches.get(branch) or self.pull_requests.get(branch)
        content = f"{len(self.commits)} {parent} {title} {sorted((path, file.oid) for path, file in files.items())}"
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, title, files)
        self.commits[commit.oid] = commit
        (self.pull_requests if branch.startswith("refs/pr/") else self.branches)[branch] = commit.oid
        return commit

    @property
    def head(self) -> Commit:
        return self.commits[self.branches["main"]]


class Refused(Exception):
    """An answer that is not 200: status, the Hub's word for it, and a sentence."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        if code is not None:
            self.headers["X-Error-Code"] = code


def small_file(content: bytes) -> File:
    return File(hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), len(content), content)


def large_file(sha256: str, size: int) -> File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return File(small_file(pointer.encode()).oid, size, sha256=sha256)


def metadata_of(readme: str) -> dict:
    match = re.match(r"---\r?\n(.*?)\r?\n---", readme, re.S)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def metadata_errors(data: dict) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    errors = []

    def check(name: str, is_good: Callable[[str], bool]) -> None:
        value = data.get(name) or []
        for part in value if isinstance(value, list) else [value]:
            if not isinstance(part, str) or not is_good(part):
                errors.append(f'"{name}" with value "{part}" is not valid')

    check("license", LICENSES.split().__contains__)
    check("base_model", REPO_ID.fullmatch)
    check("datasets", REPO_ID.fullmatch)
    check("language", LANGUAGE.fullmatch)
    check("tags", bool)
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required if "license" is other')
    for name in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f'"{name}" must be a string')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[].name" is required')
        for result in model.get("results", []):
            wanted = {"task": ["type"], "dataset": ["type", "name"]}
            errors += [
                f'"model-index[].results[].{part}.{name}" must be a string'
                for part, names in wanted.items()
                for name in names
                if not isinstance(result.get(part, {}).get(name), str)
            ]
            if not all(isinstance(metric.get("type"), str) and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index[].results[].metrics[]" needs a type and a value')
    return errors


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that went away are what some tests are about
            super().handle_error(*_)


class HubServer:
    """The Hub of one test module; a context manager that serves while it is open.

    Attributes:
        users: `{token: (name, may write)}`.
        repos: what is visible, by id.
        large: bytes of large files by sha256; what no commit names is visible to nobody.
        requests: `(method, path)` of all that was asked; `unknown`: those that no endpoint answers.
        part_size: files larger than this are uploaded in parts; None: in one.
        on_upload: called with the number of large files received so far, before the next is stored. What it raises is
            the answer ([`Refused`]), and it may wait.
        cut_downloads: so many downloads of large files break off in the middle.
        refuse_commits: so many commits are refused.
    """

    def __init__(self):
        self.users = {"hf_writer": ("ada", True), "hf_reader": ("bob", False)}
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.leaked_tokens = 0
        self.part_size: int | None = None
        self.on_upload = None
        self.cut_downloads = 0
        self.refuse_commits = 0
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def other_host(self) -> str:
        """Where large files lie: the same server under another name, so that clients see a foreign host."""
        return f"http://localhost:{self.port}"

    def content(self, file: File) -> bytes:
        return self.large[file.sha256] if file.content is None else file.content

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        return self.content(self.repos[repo_id].resolve(revision).files[path])


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/agent-harnesses", "not_here"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/commits/(?P<revision>[^/]+)", "commits"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<name>[^/]+)", "make_branch"),
        ("DELETE", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<name>[^/]+)", "delete_branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/tag/(?P<revision>[^/]+)", "make_tag"),
        ("PUT", r"/api/models/(?P<repo>[^/]+/[^/]+)/settings", "settings"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/upload/(?P<sha256>[0-9a-f]{64})", "lfs_put"),
        ("PUT", r"/upload/(?P<sha256>[0-9a-f]{64})/(?P<part>\d+)", "lfs_put"),
        ("POST", r"/upload/(?P<sha256>[0-9a-f]{64})/complete", "lfs_complete"),
        ("POST", r"/upload/(?P<sha256>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/large/(?P<sha256>[0-9a-f]{64})", "download_large"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "download"),
    ]

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.requests.append((self.command, self.path))
        # Large bodies are read by their endpoint; the others whole, so that the connection can go on.
        is_large = url.path.startswith("/upload/") and method == "PUT"
        self.body = b"" if is_large else self._read_body()
        try:
            for wanted, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, url.path)
                if wanted == method and match:
                    arguments = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, name)(**arguments)
            self.hub.unknown.append((self.command, self.path))
            raise Refused(404, "no such endpoint")
        except Refused as refusal:
            self.close_connection = self.close_connection or is_large
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            self.send(refusal.status, {"error": refusal.message, "errors": [{"message": refusal.message}]}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._read_exactly(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self._read_exactly(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            self.close_connection = True
            raise ConnectionAbortedError("the client went away")
        return data

    def send(self, status: int, content=None, headers: dict | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self) -> dict:
        return json.loads(self.body)

    # Who asks, and for what.

    def user(self) -> tuple[str, bool] | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind and token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    def writer(self, namespace: str) -> str:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user[0] != namespace or not user[1]:
            raise Refused(403, f"{user[0]} may not write to {namespace}")
        return user[0]

    def repo(self, repo_id: str, to_write: bool = False) -> Repo:
        repo, user = self.hub.repos.get(repo_id), self.user()
        if repo is None or (repo.is_private and (user is None or user[0] != repo_id.split("/")[0])):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if to_write:
            self.writer(repo_id.split("/")[0])
        return repo

    def revision(self, repo: Repo, name: str | None) -> Commit:
        commit = repo.resolve(name or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if user[1] else "read"
        self.send(200, {"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": role}}})

    def not_here(self) -> None:
        raise Refused(404, "not on this Hub")

    # Repositories.

    def create(self) -> None:
        asked = self.json()
        user = self.user()
        namespace = asked.get("organization") or (user[0] if user else "")
        self.writer(namespace)
        repo_id = f"{namespace}/{asked['name']}"
        is_private = asked.get("private") or asked.get("visibility") == "private"
        with self.hub.lock:
            if exists := repo_id in self.hub.repos:
                pass
            else:
                repo = self.hub.repos[repo_id] = Repo(repo_id, bool(is_private))
                repo.add("main", "initial commit", {".gitattributes": small_file(GIT_ATTRIBUTES)})
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        self.send(
            409 if exists else 200, answer | ({"error": "You already created this model repo"} if exists else {})
        )

    def delete(self) -> None:
        asked = self.json()
        repo = self.repo(f"{asked['organization']}/{asked['name']}", to_write=True)
        with self.hub.lock:
            del self.hub.repos[repo.id]
        self.send(200, {})

    def settings(self, repo: str) -> None:
        asked = self.json()
        self.repo(repo, to_write=True).is_private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.send(200, {})

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self.repo(repo)
        commit = self.revision(found, revision)
        card = {}
        if "README.md" in commit.files:
            card = metadata_of(self.hub.content(commit.files["README.md"]).decode())
        answer = {
            "id": repo,
            "modelId": repo,
            "author": repo.split("/")[0],
            "sha": commit.oid,
            "private": found.is_private,
            "siblings": [{"rfilename": path} for path in commit.files],
            "cardData": card,
            "tags": list(card.get("tags") or []),
        }
        for name in ("pipeline_tag", "library_name"):
            if name in card:
                answer[name] = card[name]
        if "model-index" in card:
            answer["model-index"] = card["model-index"]
        self.send(200, answer)

    def _describe(self, path: str, file: File) -> dict:
        answer = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.sha256 is not None:
            answer["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
        return answer

    def tree(self, repo: str, revision: str, path: str | None = None) -> None:
        files = self.revision(self.repo(repo), revision).files
        prefix = f"{path}/" if path else ""
        answer, folders = [], {}
        for name, file in sorted(files.items()):
            if name.startswith(prefix):
                inner = name[len(prefix) :]
                if "/" in inner:
                    folders[prefix + inner.split("/")[0]] = {"type": "directory", "oid": "0" * 40, "size": 0}
                if "/" not in inner or self.query.get("recursive") in ("true", "True", "1"):
                    answer.append(self._describe(name, file))
        self.send(200, [{**value, "path": name} for name, value in folders.items()] + answer)

    def refs(self, repo: str) -> None:
        found = self.repo(repo)

        def describe(names: dict[str, str], prefix: str) -> list[dict]:
            return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in names.items()]

        self.send(
            200,
            {
                "branches": describe(found.branches, "refs/heads/"),
                "tags": describe(found.tags, "refs/tags/"),
                "pullRequests": describe(found.pull_requests, ""),
                "converts": [],
            },
        )

    def commits(self, repo: str, revision: str) -> None:
        found = self.repo(repo)
        commit, answer = self.revision(found, revision), []
        while commit is not None:
            fields = {"id": commit.oid, "title": commit.title, "message": "", "authors": [{"user": "ada"}]}
            answer.append({**fields, "date": "2026-01-01T00:00:00.000Z"})
            commit = found.commits.get(commit.parent)
        self.send(200, answer)

    def make_branch(self, repo: str, name: str) -> None:
        found = self.repo(repo, to_write=True)
        with self.hub.lock:
            if name in found.branches:
                raise Refused(409, f"Reference already exists: {name}")
            start = self.json().get("startingPoint") if self.body else None
            found.branches[name] = self.revision(found, start).oid
        self.send(200, {})

    def delete_branch(self, repo: str, name: str) -> None:
        found = self.repo(repo, to_write=True)
        if name == "main" or name not in found.branches:
            raise Refused(403 if name == "main" else 404, f"cannot delete {name}", "RevisionNotFound")
        del found.branches[name]
        self.send(200, {})

    def make_tag(self, repo: str, revision: str) -> None:
        found = self.repo(repo, to_write=True)
        tag = self.json()["tag"]
        if tag in found.tags:
            raise Refused(409, f"Tag already exists: {tag}")
        found.tags[tag] = self.revision(found, revision).oid
        self.send(200, {})

    # Uploads.

    def validate(self) -> None:
        data = metadata_of(self.json()["content"])
        errors = metadata_errors(data)
        warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": warnings})

    def preupload(self, repo: str, revision: str) -> None:
        found = self.repo(repo, to_write="create_pr" not in self.query)
        files = self.revision(found, revision).files

        def mode(asked: dict) -> str:
            is_binary = b"\0" in base64.b64decode(asked["sample"])
            is_lfs = is_binary or asked["size"] > 10e6 or any(fnmatch.fnmatch(asked["path"], p) for p in LFS_PATTERNS)
            return "lfs" if is_lfs else "regular"

        answer = []
        for asked in self.json()["files"]:
            known = files.get(asked["path"])
            oid = {} if known is None else {"oid": known.sha256 or known.oid}
            answer.append({"path": asked["path"], "uploadMode": mode(asked), "shouldIgnore": False, **oid})
        self.send(200, {"files": answer})

    def lfs_batch(self, repo: str) -> None:
        self.repo(repo, to_write=True)
        answer = []
        for asked in self.json()["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                base = f"{self.hub.url}/upload/{asked['oid']}"
                upload = {"href": base}
                size = self.hub.part_size
                if size is not None and asked["size"] > size:
                    numbers = range(1, -(-asked["size"] // size) + 1)
                    header = {"chunk_size": str(size), **{f"{n:05}": f"{base}/{n}" for n in numbers}}
                    upload = {"href": f"{base}/complete", "header": header}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            answer.append(entry)
        self.send(200, {"transfer": "basic", "objects": answer})

    def lfs_put(self, sha256: str, part: str | None = None) -> None:
        if self.hub.on_upload is not None:
            self.hub.on_upload(len(self.hub.large))
        data = self._read_body()
        if part is None:
            self._store(sha256, data)
        else:
            self.hub.parts[sha256, int(part)] = data
        self.send(200, {}, {"ETag": hashlib.md5(data).hexdigest()})

    def _store(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused(400, "the content is not what its sha256 says")
        self.hub.large[sha256] = data

    def lfs_complete(self, sha256: str) -> None:
        parts = [self.hub.parts[sha256, part["partNumber"]] for part in self.json()["parts"]]
        self._store(sha256, b"".join(parts))
        self.send(200, {})

    def lfs_verify(self, sha256: str) -> None:
        if len(self.hub.large.get(sha256, b"")) != self.json()["size"]:
            raise Refused(404, "not uploaded")
        self.send(200, {})

    def commit(self, repo: str, revision: str) -> None:
        """All or nothing: nothing is changed before the last line has been understood."""
        is_pull_request = "create_pr" in self.query
        found = self.repo(repo, to_write=not is_pull_request)
        if self.hub.refuse_commits > 0:
            self.hub.refuse_commits -= 1
            raise Refused(403, "the Hub has a bad day")
        with self.hub.lock:
            parent = self.revision(found, revision)
            files, title = dict(parent.files), ""
            for line in self.body.splitlines():
                entry = json.loads(line)
                kind, value = entry["key"], entry["value"]
                if kind == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, parent.oid):
                        raise Refused(412, "A commit has happened since. Please refresh and try again.")
                elif kind == "file":
                    files[value["path"]] = small_file(base64.b64decode(value["content"]))
                elif kind == "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise Refused(400, f"{value['path']} points to a large file that was not uploaded")
                    files[value["path"]] = large_file(value["oid"], len(self.hub.large[value["oid"]]))
                elif kind == "deletedFile":
                    files.pop(value["path"])
                elif kind == "deletedFolder":
                    files = {p: file for p, file in files.items() if not p.startswith(value["path"].rstrip("/") + "/")}
                else:
                    raise Refused(400, f"unknown operation {kind}")
            if "README.md" in files:
                errors = metadata_errors(metadata_of(self.hub.content(files["README.md"]).decode()))
                if errors:
                    raise Refused(400, "; ".join(errors))
            answer = {}
            if is_pull_request:
                number = len(found.pull_requests) + 1
                revision = f"refs/pr/{number}"
                found.pull_requests[revision] = parent.oid
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
            commit = found.add(revision, title, files)
        url = f"{self.hub.url}/{repo}/commit/{commit.oid}"
        self.send(200, {"success": True, "commitUrl": url, "commitOid": commit.oid, **answer})

    # Downloads.

    def download(self, repo: str, revision: str, path: str) -> None:
        commit = self.revision(self.repo(repo), revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", **headers)
        file = commit.files[path]
        if file.sha256 is None:
            return self._send_bytes(file.content, {**headers, "ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        location = f"{self.hub.other_host}/large/{file.sha256}?name={quote(path)}"
        self.send(302, b"", {**headers, "Location": location})

    def download_large(self, sha256: str) -> None:
        self.hub.leaked_tokens += "Authorization" in self.headers
        self._send_bytes(self.hub.large[sha256], {"ETag": f'"{sha256}"'}, may_break=True)

    def _send_bytes(self, content: bytes, headers: dict, may_break: bool = False) -> None:
        status = 200
        headers = {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **headers}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
            headers["Content-Length"] = str(len(content))
        if may_break and self.command == "GET" and self.hub.cut_downloads > 0:
            self.hub.cut_downloads -= 1
            self.close_connection = True
            content = content[: len(content) // 2]
        self.send(status, content, headers)
