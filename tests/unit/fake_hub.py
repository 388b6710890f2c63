"""A hub on loopback: the HTTP that a download needs, with files in memory."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE_FILE_BYTES = 10_000  # larger ones are "LFS" files: sha256 in the listing, served by another host after a redirect


@dataclass
class FakeHub:
    """A server. `requests` has (method, path, Range, Authorization) of every request."""

    repos: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    tokens: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)  # names of files sent with a wrong byte
    stall_after_bytes: int | None = None  # the large files' host stalls after this many bytes
    is_stalled: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    endpoint: str = ""
    large_files_endpoint: str = ""

    def start(self) -> list[ThreadingHTTPServer]:
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self, large)) for large in (False, True)]
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.large_files_endpoint = (f"http://127.0.0.1:{server.server_port}" for server in servers)
        return servers

    def get_downloaded(self) -> set[str]:
        return {path.split("/", 5)[5] for _, path, *_ in self.requests if "/resolve/" in path and path[:7] != "/large/"}


def _describe_file(name: str, content: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"rfilename": name, "size": len(content), "blobId": blob}
    if len(content) > LARGE_FILE_BYTES:
        entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _make_handler(hub: FakeHub, serves_large_files: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments):
            pass

        def do_GET(self):
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
            if serves_large_files:
                self.send_large_file(path.removeprefix("/large"))
            elif path.startswith("/api/models/"):
                self.answer_listing(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                self.answer_file(path)
            else:
                self.refuse(404, "", "Not found")

        do_HEAD = do_GET

        def get_token_error(self, repo: str) -> tuple[int, str, str] | None:
            header = self.headers.get("Authorization")
            token = None if header is None else header.removeprefix("Bearer ")
            if token is not None and token not in hub.tokens:
                return 401, "", "Invalid credentials in Authorization header"
            if repo not in hub.repos:
                return (401 if token is None else 404), "RepoNotFound", "Repository not found"
            return None

        def answer_listing(self, path: str):
            owner, name, *rest = path.split("/")
            repo = f"{owner}/{name}"
            if error := self.get_token_error(repo):
                return self.refuse(*error)
            if rest and rest[1] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            siblings = [_describe_file(name, content) for name, content in hub.repos[repo].items()]
            return self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

        def answer_file(self, path: str):
            _, owner, name, _resolve, commit, filename = path.split("/", 5)
            repo = f"{owner}/{name}"
            if error := self.get_token_error(repo):
                return self.refuse(*error)
            if repo in hub.gated and self.headers.get("Authorization") is None:
                return self.refuse(401, "GatedRepo", "Access to model is restricted.")
            assert commit == COMMIT, "the revision is not pinned"
            content = hub.repos[repo][filename]
            if len(content) <= LARGE_FILE_BYTES:
                return self.answer(content)
            self.send_response(302)
            self.send_header("Location", f"{hub.large_files_endpoint}/large{path}")
            self.send_header("Content-Length", "0")
            return self.end_headers()

        def send_large_file(self, path: str):
            _, owner, name, _resolve, _commit, filename = path.split("/", 5)
            content = hub.repos[f"{owner}/{name}"][filename]
            if filename in hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            byte_range = self.headers.get("Range")
            begin = int(byte_range.removeprefix("bytes=").removesuffix("-")) if byte_range else 0
            self.send_response(206 if byte_range else 200)
            if byte_range:
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            if hub.stall_after_bytes is not None:
                self.wfile.write(content[begin : begin + hub.stall_after_bytes])
                self.wfile.flush()
                hub.is_stalled.set()
                hub.resume.wait(60)
                self.close_connection = True
                return None
            return self.wfile.write(content[begin:])

        def answer(self, content: bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def refuse(self, status: int, code: str, message: str):
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler
