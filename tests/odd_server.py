"""A web server on 127.0.0.1 that answers well, or in one of the ways in which hosts go wrong."""

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40  # of each repository of the Hub


@dataclass(frozen=True)
class Answer:
    """How to answer one request; the default is as a good server does."""

    status: int = 200  # anything else is an error page
    body: bytes | None = None  # another one than the file's
    cut: int | None = None  # close the connection after so many bytes of the body
    obeys_range: bool = True
    gives_length: bool = True
    headers: dict[str, str] = field(default_factory=dict)  # over the usual ones


class OddServer(ThreadingHTTPServer):
    """Files by name, and for each a list of answers that are given first, one a request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str | None]] = []  # name, Range

    def put(self, name: str, content: bytes, *answers: Answer) -> str:
        """Serve a file, giving these answers before good ones; its address."""
        self.files[name] = content
        self.answers[name] = list(answers)
        return f"{self.url}/{name}"

    def put_hub(self, repository: str, files: dict[str, bytes]) -> None:
        """Serve a repository as the Hugging Face Hub does; a data set's begins with `datasets/`."""
        entries = [
            {"type": "file", "oid": "0" * 40, "size": len(content), "path": name}
            for name, content in files.items()
        ]
        info = {"id": repository, "sha": COMMIT, "siblings": []}
        self.put(f"api/{repository}/revision/main", json.dumps(info).encode())
        self.put(f"api/{repository}/tree/{COMMIT}", json.dumps(entries).encode())
        for name, content in files.items():
            for revision in ("main", COMMIT):
                self.put(f"{repository}/resolve/{revision}/{name}", content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name, wanted = self.path.partition("?")[0].strip("/"), self.headers["Range"]
        self.server.requests.append((name, wanted))
        answers = self.server.answers.get(name, [Answer(404)])
        how = answers.pop(0) if answers else Answer()
        content = self.server.files.get(name, b"") if how.body is None else how.body
        status, start = how.status, 0
        headers = {"ETag": f'"{hash(content)}"', "Content-Type": "application/zip"}
        headers |= {"X-Repo-Commit": COMMIT, "Connection": "close"} | how.headers
        if status == 200 and wanted and how.obeys_range:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(content) else 416
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if status not in (200, 206):
            content, start = b"<html>sorry</html>", 0
        if how.gives_length:
            headers.setdefault("Content-Length", str(len(content) - start))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.close_connection = True
        if self.command == "GET":
            self.wfile.write(content[start:][: how.cut])

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""
