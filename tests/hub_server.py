"""A Hub on this machine: the part of the API that pushing and pulling models needs, kept in memory.

`HubServer` answers on a free port of 127.0.0.1. Commits are whole or absent, every revision stays readable, LFS
objects are stored only if their sha256 is right, and a card's metadata is checked before anything is uploaded.
`HubServer.faults` makes requests fail the way networks do.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml  # what the client itself reads cards with


TOKEN = "loopback"
USER = "tester"

# Files of these kinds, and all that are large, are uploaded as LFS objects ahead of the commit that names them.
_LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".h5", ".onnx", ".parquet")
_REGULAR_LIMIT = 1 << 20

_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|$)", re.DOTALL | re.MULTILINE)
_REPO_ID = r"[\w.-]+(/[\w.-]+)?"
_TASKS = (
    "feature-extraction|fill-mask|question-answering|sentence-similarity|summarization|text-classification|"
    "text-generation|text-ranking|token-classification|translation|zero-shot-classification"
)
# Field -> whether it may be one string, whether it may be an array of them, and what each string must match.
_FIELDS = {
    "language": (True, True, r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual"),
    "license": (True, True, r"[a-z0-9][a-z0-9.+-]*"),
    "base_model": (True, True, _REPO_ID),
    "library_name": (True, False, r"[\w.-]+"),
    "pipeline_tag": (True, False, _TASKS),
    "datasets": (False, True, _REPO_ID),
    "metrics": (False, True, r".*\S.*"),
    "tags": (False, True, r".*\S.*"),
}


def validate_metadata(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata at the top of a language model's card."""
    match = _FRONT_MATTER.match(content)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["the metadata is not a mapping"], []

    errors = []
    for name, (may_be_one, may_be_many, pattern) in _FIELDS.items():
        if name not in metadata:
            continue
        value = metadata[name]
        is_many = isinstance(value, list)
        strings = value if is_many else [value]
        if not (may_be_many if is_many else may_be_one):
            errors.append(f'"{name}" must be {"an array" if may_be_many else "a string"}, got {value!r}')
        elif not all(isinstance(string, str) and re.fullmatch(pattern, string) for string in strings):
            errors.append(f'"{name}" must match {pattern}, got {value!r}')
    if "model-index" in metadata:
        errors.extend(_model_index_errors(metadata["model-index"]))
    return errors, []


def _model_index_errors(model_index: Any) -> Iterator[str]:
    if not isinstance(model_index, list):
        yield '"model-index" must be an array'
        return
    for i, model in enumerate(model_index):
        place = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            yield f'"{place}.name" is required'
        elif not isinstance(model.get("results"), list):
            yield f'"{place}.results" must be an array'
        else:
            for j, result in enumerate(model["results"]):
                yield from _result_errors(result, f"{place}.results[{j}]")


def _result_errors(result: Any, place: str) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f'"{place}" must be a mapping'
        return
    for part, names in (("task", ("type",)), ("dataset", ("type", "name"))):
        for name in names:
            if not isinstance(result.get(part), dict) or not isinstance(result[part].get(name), str):
                yield f'"{place}.{part}.{name}" is required'
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        yield f'"{place}.metrics" must be an array with one entry or more'
        return
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            yield f'"{place}.metrics[{k}].type" is required'
        elif not isinstance(metric.get("value"), int | float | str):
            yield f'"{place}.metrics[{k}].value" is required'


@dataclass(frozen=True)
class Blob:
    """One file of a revision."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        """The sha256 of an LFS object, git's own hash of any other file."""
        if self.is_lfs:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """A model's repository: the files of every commit, oldest first, and what its branches point to."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], summary: str) -> str:
        tree = "\n".join(f"{path} {files[path].etag}" for path in sorted(files))
        parents = f"{self.branches.get(branch)} {len(self.commits)}"
        oid = hashlib.sha1(f"{parents}\n{summary}\n{tree}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    @property
    def head(self) -> str:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, Blob]:
        """The files of the main branch."""
        return self.commits[self.head]


class HubError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers


class HubServer(ThreadingHTTPServer):
    """The server; a context manager that answers while it is open.

    Attributes:
        repos (`dict[str, Repo]`): By id, `owner/name`.
        regular_only (`set[str]`): Ids of repositories whose files all travel inside the commit.
        faults (`dict[str, list[str]]`): What befalls the next requests of a kind, `"lfs"` (the upload of an object)
            or `"commit"`: `"break"` closes the connection half-way through the request, `"refuse"` answers 403.
        requests (`list[str]`): Method and path of every request so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.regular_only: set[str] = set()
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


_ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, pattern: str) -> Callable[[Callable], Callable]:
    """Registers a handler's method for the requests whose path is `pattern`, where `{name}` is one segment and
    `{name*}` is the rest."""
    pattern = pattern.replace("{repo}", "(?P<repo>[^/]+/[^/]+)")
    pattern = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", pattern)
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)

    def register(function: Callable) -> Callable:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client went away, or was meant to find itself alone
            self.close_connection = True

    def dispatch(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, function in _ROUTES:
                if method == self.command and (match := pattern.fullmatch(path)):
                    arguments = {name: unquote(value) for name, value in match.groupdict().items()}
                    kind = {"receive_object": "lfs", "receive_commit": "commit"}.get(function.__name__)
                    self.body = self.read_body(self.next_fault(kind))
                    function(self, **arguments)
                    return
            self.read_body()
            raise HubError(404, None, f"no such endpoint: {self.command} {path}")
        except HubError as error:
            headers = {"X-Error-Message": str(error), **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            self.answer_json({"error": str(error)}, error.status, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def log_message(self, *_: object) -> None:
        pass

    # What requests are made of

    def next_fault(self, kind: str | None) -> str | None:
        with self.server.lock:
            faults = self.server.faults[kind] if kind else []
            return faults.pop(0) if faults else None

    def read_body(self, fault: str | None = None) -> bytes:
        """The whole body, of known length or in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                if fault == "break":
                    self.break_off(size)
                chunks.append(self.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            length = int(self.headers.get("Content-Length", 0))
            if fault == "break":
                self.break_off(length)
            body = self.read(length)
        if fault == "refuse":
            raise HubError(403, None, "the request has expired")
        return body

    def read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionAbortedError("the client went away")
        return data

    def break_off(self, size: int) -> None:
        self.read(size // 2)
        self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError("broken off on purpose")

    def answer(self, content: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(value).encode(), status, **{"Content-Type": "application/json", **headers})

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.is_authorized:
            raise HubError(401, None, "Invalid username or password.")

    def repo(self, name: str, write: bool = False) -> Repo:
        if write:
            self.require_token()
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self.is_authorized):
            raise HubError(404 if self.is_authorized else 401, "RepoNotFound", "Repository not found")
        return repo

    # Endpoints

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        self.require_token()
        self.answer_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        self.require_token()
        name = f"{self.json.get('organization') or USER}/{self.json['name']}"
        url = {"url": f"{self.server.url}/{name}", "name": name}
        with self.server.lock:
            if name in self.server.repos:
                self.answer_json({**url, "error": "You already created this model repo"}, 409)
                return
            private = bool(self.json.get("private")) or self.json.get("visibility") == "private"
            repo = self.server.repos[name] = Repo(private=private)
            repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.answer_json(url)

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        errors, warnings = validate_metadata(self.json["content"])
        messages = {"errors": errors, "warnings": warnings}
        answer = {kind: [{"message": text} for text in texts] for kind, texts in messages.items()}
        self.answer_json(answer, 400 if errors else 200)

    @route("GET", "/api/models/{repo}")
    def model_info(self, repo: str) -> None:
        self.revision_info(repo, "main")

    @route("GET", "/api/models/{repo}/revision/{revision}")
    def revision_info(self, repo: str, revision: str) -> None:
        stored = self.repo(repo)
        oid = stored.resolve(revision)
        files = stored.commits[oid]
        card = _FRONT_MATTER.match(files["README.md"].content.decode()) if "README.md" in files else None
        metadata = (yaml.safe_load(card[1]) if card else None) or {}
        self.answer_json(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.split("/")[0],
                "sha": oid,
                "private": stored.private,
                "tags": metadata.get("tags") or [],
                "pipeline_tag": metadata.get("pipeline_tag"),
                "library_name": metadata.get("library_name"),
                "cardData": metadata,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    @route("GET", "/api/models/{repo}/tree/{revision}")
    def list_root(self, repo: str, revision: str) -> None:
        self.list_tree(repo, revision, "")

    @route("GET", "/api/models/{repo}/tree/{revision}/{folder*}")
    def list_tree(self, repo: str, revision: str, folder: str) -> None:
        stored = self.repo(repo)
        oid = stored.resolve(revision)
        is_recursive = "recursive=true" in self.path.lower()
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict] = {}
        for path, blob in sorted(stored.commits[oid].items()):
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if is_recursive else min(2, len(parts))):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": _fake_oid(oid, parent)}
            if is_recursive or len(parts) == 1:
                entries[path] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.etag}
                if blob.is_lfs:
                    lfs = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 128}
                    entries[path] |= {"oid": _fake_oid(oid, path), "lfs": lfs}
        if folder and not entries:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.answer_json(list(entries.values()), **{"X-Repo-Commit": oid})

    @route("POST", "/api/models/{repo}/branch/{branch}")
    def create_branch(self, repo: str, branch: str) -> None:
        stored = self.repo(repo, write=True)
        with self.server.lock:
            if branch in stored.branches:
                raise HubError(409, None, f"Reference already exists: {branch}")
            stored.branches[branch] = stored.resolve(self.json.get("startingPoint", "main"))
        self.answer_json({})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def preupload(self, repo: str, revision: str) -> None:
        stored = self.repo(repo, write=True)
        files = stored.commits[stored.resolve(revision)]
        answers = []
        for file in self.json["files"]:
            is_large = file["path"].endswith(_LFS_SUFFIXES) or file["size"] > _REGULAR_LIMIT
            mode = "lfs" if is_large and repo not in self.server.regular_only else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (blob := files.get(file["path"])) is not None:
                answer["oid"] = blob.etag
            answers.append(answer)
        self.answer_json({"files": answers})

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch")
    def batch(self, repo: str) -> None:
        stored = self.repo(repo, write=True)
        if "basic" not in self.json["transfers"] or self.json.get("hash_algo") != "sha256":
            raise HubError(422, None, "only basic transfers of sha256 objects")
        objects = []
        for wanted in self.json["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in stored.objects:
                href = f"{self.server.url}/{repo}/lfs/{wanted['oid']}?size={wanted['size']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        content_type = {"Content-Type": "application/vnd.git-lfs+json"}
        self.answer_json({"transfer": "basic", "objects": objects}, **content_type)

    @route("PUT", "/{repo}/lfs/{oid}")
    def receive_object(self, repo: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, None, "the content is not what its sha256 says")
        self.server.repos[repo].objects[oid] = self.body
        self.answer()

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def receive_commit(self, repo: str, revision: str) -> None:
        stored = self.repo(repo, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["key"] != "header" or not header["value"].get("summary"):
            raise HubError(400, None, "a commit begins with a header that has a summary")
        with self.server.lock:
            if revision not in stored.branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            parent = stored.branches[revision]
            if header["value"].get("parentCommit", parent) != parent:
                raise HubError(412, None, "the branch has moved on since the parent commit")
            files = dict(stored.commits[parent])
            for operation in operations:
                _apply(operation["key"], operation["value"], files, stored.objects)
            if (card := files.get("README.md")) and (errors := validate_metadata(card.content.decode())[0]):
                raise HubError(400, None, "; ".join(errors))
            oid = stored.commit(revision, files, header["value"]["summary"])
        self.answer_json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    @route("HEAD", "/{repo}/resolve/{revision}/{path*}")
    @route("GET", "/{repo}/resolve/{revision}/{path*}")
    def resolve(self, repo: str, revision: str, path: str) -> None:
        stored = self.repo(repo)
        oid = stored.resolve(revision)
        blob = stored.commits[oid].get(path)
        if blob is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.content))}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not (wanted[1] or wanted[2]):
            self.answer(blob.content, **headers)
            return
        size = len(blob.content)
        first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
        last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
        if first > last:
            raise HubError(416, None, "Range Not Satisfiable", **{"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.answer(blob.content[first : last + 1], 206, **headers)


def _fake_oid(*parts: str) -> str:
    """Stands for git's hash of a folder or of an LFS pointer file, which nothing here reads."""
    return hashlib.sha1("\n".join(parts).encode()).hexdigest()


def _apply(kind: str, value: dict, files: dict[str, Blob], objects: dict[str, bytes]) -> None:
    """Carries out one operation of a commit on its `files`."""
    path = value["path"]
    if kind == "file":
        content = value["content"]
        files[path] = Blob(base64.b64decode(content) if value.get("encoding") == "base64" else content.encode())
    elif kind == "lfsFile":
        content = objects.get(value["oid"])
        if content is None or len(content) != value.get("size", len(content)):
            raise HubError(400, None, f"the LFS object of {path} was not uploaded")
        files[path] = Blob(content, is_lfs=True)
    elif kind in ("deletedFile", "deletedFolder"):
        doomed = [file for file in files if file == path or (kind == "deletedFolder" and file.startswith(f"{path}/"))]
        if not doomed:
            raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        for file in doomed:
            del files[file]
    else:
        raise HubError(400, None, f"unknown operation: {kind}")
