"""A stand-in for the Hub on 127.0.0.1: the few calls huggingface_hub makes, with range requests."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "a" * 40


class Hub:
    """Repositories by name, each {file name: bytes}; ``log`` keeps (method, path, bytes sent)."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.gated: set[str] = set()
        self.log: list[tuple[str, str, int]] = []
        self.url = ""

    def sent(self, ending: str) -> int:
        """How many bytes of files with this ending were sent."""
        return sum(n for method, path, n in self.log if method == "GET" and path.endswith(ending))


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(send=True)

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def answer(self, send: bool) -> None:
            parts = [unquote(p) for p in urlsplit(self.path).path.strip("/").split("/")]
            api = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if api else parts[:2])
            rest = parts[4:] if api else parts[2:]
            if repo not in hub.repos:
                return self.refuse(401, "RepoNotFound", send)
            if len(rest) > 1 and rest[1] not in ("main", "v1", SHA):
                return self.refuse(404, "RevisionNotFound", send)
            files = hub.repos[repo]
            if api and rest[:1] == ["tree"]:
                listing = [
                    {"type": "file", "path": n, "size": len(b), "oid": _oid(b)}
                    for n, b in sorted(files.items())
                ]
                return self.reply(json.dumps(listing).encode(), {}, send)
            if api:
                siblings = [{"rfilename": n} for n in sorted(files)]
                info = {"id": repo, "modelId": repo, "sha": SHA, "siblings": siblings}
                return self.reply(json.dumps(info).encode(), {}, send)
            if repo in hub.gated:
                return self.refuse(403, "GatedRepo", send)
            name = "/".join(rest[2:])
            if name not in files:
                return self.refuse(404, "EntryNotFound", send)
            headers = {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": SHA}
            return self.reply(files[name], headers, send)

        def reply(self, body: bytes, headers: dict[str, str], send: bool) -> None:
            wanted = self.headers.get("Range", "")
            status = 200
            if wanted.startswith("bytes=") and send:
                start, _, stop = wanted.removeprefix("bytes=").partition("-")
                whole, low = len(body), int(start)
                body = body[low : int(stop) + 1 if stop else None]
                headers = {**headers, "Content-Range": f"bytes {low}-{low + len(body) - 1}/{whole}"}
                status = 206
            self.send_response(status)
            for name, value in {"Accept-Ranges": "bytes", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send:
                self.wfile.write(body)
            hub.log.append((self.command, urlsplit(self.path).path, len(body)))

        def refuse(self, status: int, code: str, send: bool) -> None:
            body = json.dumps({"error": code}).encode()
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"refused: {code}")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if send:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def lay_out_cache(home: Path, repo: str, files: dict[str, bytes], refs: tuple[str, ...]) -> Path:
    """A repository in a cache, with blobs, snapshot links and refs as huggingface_hub makes them."""
    storage = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = storage / "snapshots" / SHA
    (storage / "blobs").mkdir(parents=True)
    for name, body in files.items():
        blob = storage / "blobs" / _oid(body)
        blob.write_bytes(body)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + name.count("/"))
        (snapshot / name).symlink_to(f"{up}blobs/{blob.name}")
    for ref in refs:
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / ref).write_text(SHA)
    return snapshot
