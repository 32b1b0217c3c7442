"""A local HTTP server that answers as the Hugging Face Hub does, as far as downloads and one-commit uploads go."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories as dicts of files; `requests` lists what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.url = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def reply_json(self, data: object) -> None:
            self.reply(200, json.dumps(data).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("authorization", ""))
            parts = path.strip("/").split("/")
            parts = parts[parts[0] == "datasets" :]  # whose files' addresses begin so
            api = parts[:2] in (["api", "models"], ["api", "datasets"])
            repo = "/".join(parts[2:4] if api else parts[:2])
            files = hub.repos.get(repo)
            if files is None:
                return self.reply(404, b"{}", X_Error_Code="RepoNotFound")
            revision = (
                parts[5]
                if api and len(parts) > 5
                else parts[3]
                if not api and len(parts) > 3
                else "main"
            )
            if revision not in ("main", SHA):
                return self.reply(404, b"{}", X_Error_Code="RevisionNotFound")
            if api and len(parts) > 4 and parts[4] == "tree":
                tree = [
                    {"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                    for n, b in files.items()
                ]
                return self.reply_json(tree)
            if api:
                siblings = [{"rfilename": name} for name in files]
                return self.reply_json(
                    {
                        "id": repo,
                        "modelId": repo,
                        "sha": SHA,
                        "private": False,
                        "siblings": siblings,
                        "tags": [],
                    }
                )
            body = files.get("/".join(parts[4:]))
            if body is None:
                return self.reply(404, b"{}", X_Error_Code="EntryNotFound")
            self.reply(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=SHA)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = (
                    f"{asked['organization']}/{asked['name']}"
                    if asked.get("organization")
                    else asked["name"]
                )
                hub.repos.setdefault(name, {})
                return self.reply_json({"url": f"{hub.url}/{name}", "name": name, "id": name})
            if path == "/api/validate-yaml":
                return self.reply_json({"warnings": [], "errors": []})
            repo = "/".join(path.strip("/").split("/")[2:4])
            if "/preupload/" in path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self.reply_json({"files": files})
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "deletedFile":
                    del hub.repos[repo][entry["value"]["path"]]
                if entry["key"] == "file":
                    hub.repos[repo][entry["value"]["path"]] = base64.b64decode(
                        entry["value"]["content"]
                    )
            self.reply_json(
                {
                    "success": True,
                    "commitOid": SHA,
                    "commitUrl": f"{hub.url}/{repo}/commit/{SHA}",
                    "hookOutput": "",
                }
            )

    return Handler


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to in this test."""
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield hub


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
