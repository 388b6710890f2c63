"""A hub on loopback with the part of the HTTP API that `datasets` needs, and a history of each data set."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMITS = {"v1": "1" * 40, "main": "2" * 40}


class FakeDatasetHub:
    """`files` of each commit: revision -> name -> content; every repository has the same."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        self.files = {COMMITS[revision]: content for revision, content in files.items()}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def find(self, revision: str) -> str | None:
        commit = COMMITS.get(revision, revision)
        return commit if commit in self.files else None


def _describe(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def _make_handler(hub: FakeDatasetHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments):
            pass

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path).path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                self.answer_api(parts[4:5], parts[5:])
            elif parts[0] == "datasets" and parts[3:4] == ["resolve"]:
                self.answer_file(parts[4], "/".join(parts[5:]))
            else:
                self.send(404, b"{}")

        do_HEAD = do_POST = do_GET

        def answer_api(self, what: list[str], rest: list[str]):
            commit = hub.find(rest[0] if rest else "main")
            if commit is None:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            files = [_describe(name, content) for name, content in hub.files[commit].items()]
            if what in (["tree"], ["paths-info"]):
                return self.send(200, json.dumps(files).encode())
            siblings = [{"rfilename": file["path"]} for file in files]
            return self.send(200, json.dumps({"id": "someone/chats", "sha": commit, "siblings": siblings}).encode())

        def answer_file(self, revision: str, name: str):
            commit = hub.find(revision)
            content = hub.files.get(commit or "", {}).get(name)
            if content is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

        def send(self, status: int, content: bytes, headers: dict[str, str] | None = None):
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler
