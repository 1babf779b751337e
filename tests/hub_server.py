"""A Hub on this machine: it keeps what `push_to_hub` sends and serves it, as far as huggingface_hub asks."""

import base64
import hashlib
import json
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """
    Attributes:
        files: By repository, path and content.
        requests: Method and path of each.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = defaultdict(dict)
        self.requests = []
        self.num_commits = 0

    @property
    def commit(self):
        """The newest one."""
        return f"{self.num_commits:040x}"

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Nothing: the requests are kept."""

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            if repository not in self.server.files:
                self.answer(404, X_Error_Code="RepoNotFound")
            elif "tree" in parts:
                self.answer_json([])
            else:
                siblings = [{"rfilename": name} for name in self.server.files[repository]]
                self.answer_json({"id": repository, "sha": self.server.commit, "siblings": siblings, "tags": []})
            return
        files, name = self.server.files.get("/".join(parts[:2])), "/".join(parts[4:])
        if files is None:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif name not in files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.server.commit)
        else:
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=self.server.commit)

    do_HEAD = do_GET

    def do_POST(self):
        path = urlsplit(self.path).path
        self.server.requests.append(("POST", path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, [given.get("organization"), given["name"]]))
            self.server.files[name] |= {}
            self.answer_json({"url": f"{self.server.endpoint}/{name}", "id": name})
        elif path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            repository = "/".join(path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.num_commits += 1
            url = f"{self.server.endpoint}/{repository}/commit/{self.server.commit}"
            self.answer_json({"success": True, "commitOid": self.server.commit, "commitUrl": url})
        else:
            self.answer(404)


@contextmanager
def running_hub():
    """A Hub that answers until the block ends."""
    with Hub() as hub:
        thread = Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
