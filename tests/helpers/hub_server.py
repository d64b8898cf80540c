"""A server that speaks the endpoints of the Hugging Face Hub that `huggingface_hub` needs to push a commit and to load it again.

`python tests/helpers/hub_server.py FOLDER` prints its address and keeps repositories in FOLDER/user/name. Large files come by LFS, as on
the hub; a token "reads-only" may not write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c0" * 20
USER = "me"


class Hub(BaseHTTPRequestHandler):
    """One request."""

    root: Path

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token != "writes":
            self.answer({"error": "no"}, 403 if token == "reads-only" else 401)
        elif self.path == "/api/repos/create":
            given = json.loads(body)
            owner = given.get("organization") or USER
            (self.root / owner / given["name"]).mkdir(parents=True, exist_ok=True)
            (self.root / f"created-{given['name']}.json").write_text(json.dumps(given))
            self.answer({"url": f"http://{self.headers['Host']}/{owner}/{given['name']}", "name": f"{owner}/{given['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [each["path"] for each in json.loads(body)["files"]]
            large = {path: path.endswith(".safetensors") for path in paths}
            modes = [{"path": path, "uploadMode": "lfs" if large[path] else "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            place = f"http://{self.headers['Host']}/lfs/"
            self.answer(
                {"transfer": "basic", "objects": [{**each, "actions": {"upload": {"href": place + each["oid"]}}} for each in objects]}
            )
        elif "/branch/" in self.path:
            (self.root / "branch.txt").write_text(self.path.rpartition("/")[2])
            self.answer({})
        elif "/commit/" in self.path:
            (self.root / "revision.txt").write_text(self.path.rpartition("/")[2].partition("?")[0])
            self.commit(self.path.split("/")[3:5], [json.loads(line) for line in body.splitlines()])
        else:
            self.answer({"error": f"POST {self.path}"}, 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / self.path.rpartition("/")[2]).write_bytes(content)
        self.answer({})

    def commit(self, repo: list[str], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                (self.root / "message.txt").write_text(value["summary"])
                continue
            place = self.root.joinpath(*repo, value["path"])
            place.parent.mkdir(parents=True, exist_ok=True)
            stored = base64.b64decode(value["content"]) if line["key"] == "file" else (self.root / "lfs" / value["oid"]).read_bytes()
            place.write_bytes(stored)
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"http://{self.headers['Host']}/{'/'.join(repo)}/commit/{COMMIT}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if words[:2] == ["api", "models"]:
            repo = self.root.joinpath(*words[2:4])
            names = [path.relative_to(repo).as_posix() for path in sorted(repo.rglob("*")) if path.is_file()]
            if "tree" in words:
                self.answer([{"type": "file", "path": name, "size": (repo / name).stat().st_size, "oid": "0" * 40} for name in names])
            else:
                self.answer({"id": "/".join(words[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]})
            return
        place = self.root.joinpath(*words[:2], *words[4:])
        if words[2:3] != ["resolve"] or not place.is_file():
            self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = place.read_bytes()
        self.answer(content, 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def serve(root: Path) -> ThreadingHTTPServer:
    """A server on a free port of this machine, not yet serving."""
    return ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"root": root}))


if __name__ == "__main__":
    server = serve(Path(sys.argv[1]))
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
