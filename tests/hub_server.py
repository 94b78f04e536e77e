"""A small Hub on loopback, for the real client: models and datasets, commits, large files.

A dataset's repository is named `datasets/USER/NAME`.

What it answers is what huggingface_hub 1.x and 2.x ask; see huggingface_hub/_commit_api.py and
huggingface_hub/file_download.py.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 10 * 1024
"""Bytes from which a file is uploaded by itself."""


@dataclass
class Repo:
    """Files by branch; a commit's name is the digest of what it holds."""

    private: bool = True
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[str] = field(default_factory=list)
    was_public_while_empty: bool = False

    def sha(self, branch: str) -> str:
        held = self.branches[branch]
        names = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in held.items())
        return hashlib.sha1(names.encode()).hexdigest()

    def branch(self, revision: str) -> str | None:
        names = [name for name in self.branches if revision in (name, self.sha(name))]
        return names[0] if names else None


class Hub(ThreadingHTTPServer):
    """Started by `with`; `token` is the one that may write, as `user`."""

    daemon_threads = True

    def __init__(self, token: str = "hf_good", user: str = "user"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.user = token, user
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.part_bytes: int | None = None
        """Where set, large files come in parts of so many bytes."""
        self.parts: dict[tuple[str, int], bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], int | None] = lambda _method, _path: None
        """A status to answer instead, or 0 to hang up."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up; that is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path).replace("/api/datasets/", "/api/models/datasets/")
        self.hub.asked.append((self.command, path))
        fault = self.hub.fault(self.command, path)
        if fault == 0:
            self.close_connection = True
            self.connection.close()
            return
        self.body = self.read_body()
        if fault:
            self.send(fault, {"error": "as asked for"})
            return
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in (self.command, "GET" if self.command == "HEAD" else ""):
                getattr(self, name)(*match.groups())
                return
        self.send(404, {"error": f"no {self.command} {path}"})

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, value: Any = None, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may_write(self, repo: str | None = None) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given != self.hub.token:
            self.send(401, {"error": "Invalid credentials"})
        elif repo and repo.partition("/")[0] != self.hub.user:
            self.send(403, {"error": "you have no right to write here"})
        else:
            return True
        return False

    def found(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        signed = self.headers.get("Authorization", "") == f"Bearer {self.hub.token}"
        if repo and (signed or not repo.private):
            return repo
        self.send(401 if repo is None else 404, {"error": "x"}, X_Error_Code="RepoNotFound")
        return None

    def whoami(self) -> None:
        if self.may_write():
            self.send(200, {"name": self.hub.user, "type": "user", "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        if not self.may_write(name):
            return
        if name in self.hub.repos:
            self.send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            return
        is_private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.repos[name] = Repo(is_private, was_public_while_empty=not is_private)
        self.send(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def settings(self, name: str) -> None:
        if (repo := self.found(name)) and self.may_write(name):
            asked = json.loads(self.body)
            repo.private = bool(asked.get("private", asked.get("visibility") == "private"))
            self.send(200, {"private": repo.private})

    def make_branch(self, name: str, branch: str) -> None:
        if (repo := self.found(name)) and self.may_write(name):
            if branch in repo.branches:
                self.send(409, {"error": "exists"})
                return
            repo.branches[branch] = dict(repo.branches["main"])
            self.send(200, {})

    def preupload(self, name: str, branch: str) -> None:
        if (repo := self.found(name)) and self.may_write(name):
            if branch not in repo.branches:
                self.send(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
                return
            told = []
            for file in json.loads(self.body)["files"]:
                mode = "lfs" if file["size"] >= LARGE else "regular"
                held = repo.branches[branch].get(file["path"])
                oid = None if held is None else (_sha256 if mode == "lfs" else _git_sha)(held)
                told.append(
                    {
                        "path": file["path"],
                        "uploadMode": mode,
                        "shouldIgnore": False,
                        "oid": oid,
                    }
                )
            self.send(200, {"files": told})

    def batch(self, name: str) -> None:
        if not self.may_write(name):
            return
        told = []
        for each in json.loads(self.body)["objects"]:
            oid, size, part = each["oid"], each["size"], self.hub.part_bytes
            upload: dict[str, Any] = {"href": f"{self.hub.url}/blobs/{oid}"}
            if part:
                numbers = range(1, -(-size // part) + 1)
                urls = {str(i): f"{self.hub.url}/parts/{oid}/{i}" for i in numbers}
                upload["header"] = {"chunk_size": str(part), **urls}
            verify = {"href": f"{self.hub.url}/verify"}
            actions = {"actions": {"upload": upload, "verify": verify}}
            is_held = oid in self.hub.blobs
            told.append({"oid": oid, "size": size, **({} if is_held else actions)})
        self.send(200, {"transfer": "basic", "objects": told})

    def put_blob(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            self.send(400, {"error": "another digest"})
            return
        self.hub.blobs[oid] = self.body
        self.send(200, {})

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.send(200, {}, ETag=f'"{_sha256(self.body)}"')

    def complete(self, oid: str) -> None:
        """Parts put together, if the client tells the tags that it was given for them."""
        told = json.loads(self.body)["parts"]
        held = [self.hub.parts[oid, each["partNumber"]] for each in told]
        tags = [f'"{_sha256(data)}"' for data in held]
        self.body = b"".join(held)
        if tags == [each["etag"] for each in told]:
            self.put_blob(oid)
        else:
            self.send(400, {"error": "other tags"})

    def verify(self) -> None:
        asked = json.loads(self.body)
        held = self.hub.blobs.get(asked["oid"])
        is_whole = held is not None and len(held) == asked["size"]
        self.send(200 if is_whole else 404, {})

    def commits(self, name: str, branch: str) -> None:
        if repo := self.found(name):
            about = {"authors": [{"user": self.hub.user}], "date": "2026-01-01T00:00:00.000Z"}
            told = [
                {"id": f"{i:040x}", "title": title, "message": "", **about}
                for i, title in enumerate(repo.commits)
            ]
            self.send(200, told[::-1])

    def commit(self, name: str, branch: str) -> None:
        if not ((repo := self.found(name)) and self.may_write(name)):
            return
        files = dict(repo.branches[branch])
        for line in self.body.splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif each["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                repo.commits.append(value["summary"])
        repo.branches[branch] = files
        sha = repo.sha(branch)
        self.send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def info(self, name: str, revision: str | None = None) -> None:
        if not (repo := self.found(name)):
            return
        if not (branch := repo.branch(revision or "main")):
            self.send(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in repo.branches[branch]]
        self.send(
            200,
            {"id": name, "sha": repo.sha(branch), "private": repo.private, "siblings": siblings},
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        if not (repo := self.found(name)):
            return
        branch = repo.branch(revision)
        held = repo.branches[branch] if branch else {}
        start = f"{folder}/" if folder else ""
        inside = {path: held[path] for path in held if path.startswith(start)}
        if folder and not inside:
            self.send(404, {"error": "x"}, X_Error_Code="EntryNotFound")
            return
        parents = {str(each) for path in inside for each in PurePosixPath(path).parents}
        below = sorted(each for each in parents if each != "." and each.startswith(start))
        entries = [{"type": "directory", "path": each, "oid": "0" * 40} for each in below]
        entries += [_entry(path, data) for path, data in inside.items()]
        if "recursive=true" not in self.path.lower():
            entries = [each for each in entries if "/" not in each["path"][len(start) :]]
        self.send(200, entries)

    def paths_info(self, name: str, revision: str) -> None:
        if (repo := self.found(name)) and (branch := repo.branch(revision)):
            paths = parse_qs(self.body.decode())["paths"]
            held = repo.branches[branch]
            self.send(200, [_entry(path, held[path]) for path in paths if path in held])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self.found(name)):
            return
        branch = repo.branch(revision)
        data = repo.branches[branch].get(path) if branch else None
        if data is None:
            code = "EntryNotFound" if branch else "RevisionNotFound"
            sha = {"X_Repo_Commit": repo.sha(branch)} if branch else {}
            self.send(404, {"error": "x"}, X_Error_Code=code, **sha)
            return
        about = {"ETag": f'"{_git_sha(data)}"', "X_Repo_Commit": repo.sha(str(branch))}
        if len(data) >= LARGE:
            about |= {"X_Linked_Etag": f'"{_sha256(data)}"', "X_Linked_Size": str(len(data))}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
            about["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            self.send(206, data[first : last + 1], **about)
        else:
            self.send(200, data, **about)


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_sha(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


_REPO = r"((?:datasets/)?[^/]+/[^/]+)"
_ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("PUT", f"/api/models/{_REPO}/settings", "settings"),
    ("POST", f"/api/models/{_REPO}/branch/(.+)", "make_branch"),
    ("POST", f"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/blobs/(.+)", "put_blob"),
    ("PUT", r"/parts/([^/]+)/(\d+)", "put_part"),
    ("POST", "/blobs/(.+)", "complete"),
    ("POST", "/verify", "verify"),
    ("POST", f"/api/models/{_REPO}/commit/(.+)", "commit"),
    ("GET", f"/api/models/{_REPO}/commits/(.+)", "commits"),
    ("POST", f"/api/models/{_REPO}/paths-info/(.+)", "paths_info"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/(.+)", "info"),
    ("GET", f"/api/models/{_REPO}/tree/([^/]+)(?:/(.+))?", "tree"),
    ("GET", f"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
)
