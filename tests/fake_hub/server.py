"""A Hugging Face Hub on loopback, for tests: the real `huggingface_hub` client talks to it.

    with FakeHub(tmp / "repos", tokens={"hf_alice": "alice"}) as hub:
        os.environ.update(hub.env(tmp / "home"))             # BEFORE huggingface_hub is imported
        repo = hub.repo("google/gemma-scope-2b-pt-res")      # made if missing
        (repo.dir / "config.json").write_text("{}")          # writing into repo.dir = a new commit on main
        hub.fail("^GET /_cdn", cut=100_000, times=2)         # faults: a regex on "METHOD /path?query"
        assert not hub.seen("^GET")                          # what was asked for

Files lie in ROOT/ORG/NAME/... (datasets: ROOT/datasets/ORG/NAME/...). What is there is branch `main`:
a change made there by hand is a new commit at the next request, and a push is written there. It binds
127.0.0.1 only.
"""

import json
import os
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from .push import Pushing, routes
from .store import HubError, Repo


@dataclass
class Fault:
    """What befalls the next `times` requests (-1: all) whose "METHOD /path?query" the regex `match` is in."""

    match: str
    times: int = 1
    skip: int = 0  # let this many matching requests through first
    delay: float = 0.0  # seconds to wait before doing anything
    status: int = 0  # do nothing but answer with this status ...
    code: str = ""  # ... and this X-Error-Code
    cut: int | None = (
        None  # close the connection after this many body bytes; -1: before any answer, the work done
    )
    rst: bool = False  # cut with a TCP reset, not an orderly close
    flip: int | None = None  # flip the body's byte at this offset: right length, wrong content
    headers: dict = field(default_factory=dict)  # response headers to set; None removes one


class FakeHub:
    """`with FakeHub(root) as hub:` serves at `hub.endpoint`. `tokens`: access token -> user name."""

    def __init__(self, root, port=0, tokens=None, page_size=1000, cdn=True):
        self.root, self.tokens = Path(root).resolve(), tokens or {"hf_test": "tester"}
        self.page_size, self.cdn, self.lock = page_size, cdn, threading.RLock()
        self.repos, self.lfs, self.faults, self.requests = {}, {}, [], []  # lfs: sha256 -> content
        self.http = ThreadingHTTPServer(
            ("127.0.0.1", port), type("Bound", (Handler,), {"hub": self})
        )  # loopback only
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"
        self.cdn_endpoint = f"http://localhost:{self.http.server_port}"  # another host: no token may reach it
        for kind, base in (("model", self.root), ("dataset", self.root / "datasets")):
            for path in base.glob("*/*/"):
                if base != self.root or path.parent.name != "datasets":
                    self.repo(f"{path.parent.name}/{path.name}", kind)

    def repo(self, repo_id, kind="model", **options):
        """The repository, made if missing. Options: gated, private, disabled, allowed."""
        if (kind, repo_id) not in self.repos:
            self.repos[kind, repo_id] = Repo(
                self.root / ("" if kind == "model" else kind + "s") / repo_id, repo_id
            )
        vars(self.repos[kind, repo_id]).update(options)
        return self.repos[kind, repo_id]

    def fail(self, match, **what):
        self.faults.append(Fault(match, **what))
        return self.faults[-1]

    def seen(self, pattern):
        """The requests so far that the regex is found in, as ("METHOD /path?query", headers) pairs."""
        return [request for request in self.requests if re.search(pattern, request[0])]

    def env(self, home):
        """Environment of a process that is to know no other Hub; to be set before it imports the client."""
        on = "DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_PROGRESS_BARS", "DISABLE_UPDATE_CHECK"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "NO_PROXY": "*",
            **{f"HF_HUB_{k}": "1" for k in on},
        }

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.http.shutdown()
        self.http.server_close()


class Handler(Pushing, BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None
    KIND, API = "(?:(datasets)/)?", "/api/(models|datasets)/"
    REPO, REV = "((?:[^/]+/)?[^/]+)", "([^/]+)"
    ROUTES: ClassVar = [
        ("GET HEAD", f"/{KIND}{REPO}/resolve/{REV}/(.+)", "resolve"),
        ("GET HEAD", "/_cdn/([0-9a-f]{64})", "cdn"),
        ("GET", f"{API}{REPO}/tree/{REV}(?:/(.*))?", "tree"),
        ("POST", f"{API}{REPO}/paths-info/{REV}", "paths"),
        ("GET", f"{API}{REPO}/refs", "refs"),
        ("GET", f"{API}{REPO}/revision/{REV}", "info"),
    ]
    ROUTES += [*routes(KIND, API, REPO, REV), ("GET", f"{API}{REPO}", "info")]

    def handle_request(self):
        url, line = urlsplit(self.path), f"{self.command} {self.path}"
        self.query, self.body, self.fault = parse_qs(url.query), self.read_body(), Fault("")
        with self.hub.lock:
            self.hub.requests.append((line, dict(self.headers)))
            for fault in self.hub.faults:
                if fault.times and re.search(fault.match, line):
                    if not fault.skip:
                        fault.times, self.fault = fault.times - 1, fault
                        break
                    fault.skip -= 1
        time.sleep(self.fault.delay)
        try:
            if self.fault.status:
                raise HubError(self.fault.status, "injected fault", self.fault.code)
            for methods, pattern, name in self.ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, url.path)):
                    with self.hub.lock:
                        answer = getattr(self, name)(*(unquote(g) if g else g for g in match.groups()))
                    return self.reply(*answer) if isinstance(answer, tuple) else self.reply(answer)
            raise HubError(404, f"Not found: {line}")
        except HubError as error:
            self.reply(error.body, error.status, error.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def read_body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def reply(self, body, status=200, headers=None):
        fault, kind = (
            self.fault,
            "application/octet-stream" if isinstance(body, bytes) else "application/json",
        )
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if fault.cut != -1:
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": len(body), **(headers or {}), **fault.headers}
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name, str(value))
            self.end_headers()
            if fault.flip is not None:
                body = (
                    body[: fault.flip]
                    + bytes(b ^ 255 for b in body[fault.flip :][:1])
                    + body[fault.flip + 1 :]
                )
            self.wfile.write(b"" if self.command == "HEAD" else body[: fault.cut])
        if fault.cut is not None:
            self.close_connection = True
            time.sleep(0.05 if fault.rst else 0)  # a reset discards what the client has not read yet
            if fault.rst:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def user(self, needed=False):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.hub.tokens and (token or needed):
            raise HubError(
                401,
                "Invalid credentials in Authorization header" if token else "Invalid username or password",
            )
        return self.hub.tokens.get(token)

    def repo(self, kind, repo_id, write=False):
        user, repo = self.user(), self.hub.repos.get(((kind or "models")[:-1], repo_id))
        if not repo or (
            repo.private and not user
        ):  # the real Hub leaves the code out of a 401: README, "http"
            raise HubError(404 if user else 401, "Repository not found", "RepoNotFound")
        if repo.disabled:
            raise HubError(403, "Access to this resource is disabled.")
        self.user(needed=write)
        repo.sync()
        return repo

    def info(self, kind, repo_id, revision="main"):
        repo = self.repo(kind, repo_id)
        sha = repo.resolve(revision)
        siblings = [
            f.entry(n) if "blobs" in self.query else {"rfilename": n} for n, f in repo.commits[sha].items()
        ]
        return {
            "id": repo.id,
            "sha": sha,
            "private": repo.private,
            "gated": repo.gated and "manual",
            "tags": [],
            "lastModified": "2024-01-01T00:00:00.000Z",
            "siblings": siblings,
        }

    def tree(self, kind, repo_id, revision, folder):
        repo, prefix, found = self.repo(kind, repo_id), folder.strip("/") + "/" if folder else "", {}
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        for name, file in repo.commits[repo.resolve(revision)].items():
            if name.startswith(prefix):
                parts = name[len(prefix) :].split("/")
                for i in range(1, len(parts) if deep else min(2, len(parts))):
                    path = prefix + "/".join(parts[:i])
                    found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                if deep or len(parts) == 1:
                    found[name] = file.entry(name)
        if prefix and not found:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        end, base = start + self.hub.page_size, re.sub(r"[?&]cursor=\d+", "", self.path)
        link = f'<{self.hub.endpoint}{base}{"&" if "?" in base else "?"}cursor={end}>; rel="next"'
        return [found[n] for n in sorted(found)][start:end], 200, {"Link": link if end < len(found) else None}

    def paths(self, kind, repo_id, revision):
        repo, asked = self.repo(kind, repo_id), parse_qs(self.body.decode()).get("paths", [])
        return [f.entry(n) for n, f in repo.commits[repo.resolve(revision)].items() if n in asked]

    def refs(self, kind, repo_id):
        repo = self.repo(kind, repo_id)
        heads = {n: ids[-1] for n, ids in repo.heads.items()}
        lists = {
            key: [{"name": n, "ref": f"refs/{space}/{n}", "targetCommit": sha} for n, sha in table.items()]
            for key, space, table in (("branches", "heads", heads), ("tags", "tags", repo.tags))
        }
        return {**lists, "converts": [], "pullRequests": []}

    def resolve(self, kind, repo_id, revision, name):
        repo = self.repo(kind, repo_id)
        if repo.gated and self.user() not in repo.allowed:
            raise HubError(403 if self.user() else 401, f"Access to {repo.id} is restricted.", "GatedRepo")
        sha = repo.resolve(revision)
        if not (file := repo.commits[sha].get(name)):
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.etag}"'}
        if not (file.lfs and self.hub.cdn):
            return self.content(file.data, headers)
        self.hub.lfs[file.sha256] = file.data
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": file.size}
        return b"", 302, {"Location": f"{self.hub.cdn_endpoint}/_cdn/{file.sha256}", **headers, **linked}

    def cdn(self, sha256):
        if sha256 not in self.hub.lfs:
            raise HubError(403, "No such object")
        return self.content(self.hub.lfs[sha256], {"ETag": f'"{sha256[:32]}"'})

    def content(self, data, headers):
        headers = {"Accept-Ranges": "bytes", **headers}
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return data, 200, headers
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if start > end:
            raise HubError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(data)}"})
        return data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}

    def log_message(self, *args):
        pass
