"""A server that answers as the Hugging Face hub does, as far as huggingface_hub asks: files (small
ones itself, large ones by redirect to another host), ranges of them, and what a repository is.

https://huggingface.co/docs/hub/api; the names of errors are those that huggingface_hub looks for in
the header X-Error-Code.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 5000                # bytes from which on a file comes from the other host


class Hub(http.server.ThreadingHTTPServer):
    """Serves {"owner/name" or "datasets/owner/name": folder}. `seen` has every request: (method,
    path, token). `faults` says for each repository what goes wrong with it."""

    def __init__(self, repos, other_host=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = repos
        self.other_host = other_host
        self.seen = []
        self.faults = {}
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        path = urllib.parse.unquote(self.path.lstrip("/").partition("?")[0])
        token = self.headers.get("Authorization")
        server.seen.append((self.command, path, token))
        if path.startswith("api/"):
            return self.answer_api(path)
        repo, _, rest = path.partition("/resolve/")
        file = rest.partition("/")[2]
        faults = server.faults.get(repo, {})
        if error := faults.get("error"):
            status, code = error
            return self.answer(status, {"X-Error-Code": code} if code else {})
        if "members only" in faults and token != f"Bearer {faults['members only']}":
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if repo not in server.repos:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        source = server.repos[repo] / file
        facts = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not source.is_file():
            return self.answer(404, facts | {"X-Error-Code": "EntryNotFound"})
        if faults.get("no commit"):
            del facts["X-Repo-Commit"]
        body = source.read_bytes()
        if len(body) < LARGE:
            facts["ETag"] = f'"{hashlib.sha1(b"blob %d" % len(body) + b"0" + body).hexdigest()}"'
            return self.send(body, facts)
        if faults.get("cut"):
            facts["cut"] = True
        facts |= {"X-Linked-Etag": f'"{hashlib.sha256(body).hexdigest()}"',
                  "X-Linked-Size": str(len(body))}
        if server.other_host:
            return self.answer(302, facts | {"Location": server.other_host.url + self.path})
        self.send(body, facts | {"ETag": facts["X-Linked-Etag"]})

    do_HEAD = do_GET

    def answer_api(self, path):
        """What a repository is: its name, its commit, and the names of its files."""
        match = re.fullmatch(r"api/(models/)?(.+?)(/revision/[^/]+)?(/tree/[^/]+.*)?", path)
        folder = self.server.repos.get(match[2])
        if folder is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        facts = {"id": match[2].removeprefix("datasets/"), "_id": "0", "sha": COMMIT,
                 "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                 "tags": [], "siblings": [{"rfilename": file.relative_to(folder).as_posix()}
                                          for file in files]}
        if match[4]:
            facts = [{"type": "file", "path": file.relative_to(folder).as_posix(),
                      "size": file.stat().st_size, "oid": "0" * 40} for file in files]
        self.send(json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def send(self, body, headers):
        """A file, or the range of it that was asked for."""
        status = 200
        is_cut = headers.pop("cut", False)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(body) - 1)
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}
            body = body[first:last + 1]
            status = 206
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_cut:
            self.wfile.write(body[:len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def answer(self, status, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": "0"}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass
