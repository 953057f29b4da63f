"""A small photo album, as it might have existed for years: it takes uploads and has never heard of Twogate.

python3 app.py [PORT]            standard library only; keeps the pictures in memory
"""

import email.parser
import email.policy
import html
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = """<!doctype html><meta charset="utf-8"><title>Album</title><h1>Album</h1>
<form method="post" action="/upload" enctype="multipart/form-data">
<input type="file" name="picture"> <button>Upload</button></form><p>{n} pictures</p><ul>{items}</ul>"""
album: dict[str, bytes] = {}


class Album(BaseHTTPRequestHandler):
    """GET / shows the album, GET /pictures/NAME one picture, POST /upload adds one."""

    def do_GET(self) -> None:
        """Show."""
        if self.path == "/":
            items = "".join(f'<li><a href="/pictures/{html.escape(name)}">{html.escape(name)}</a></li>' for name in album)
            self.answer(200, PAGE.format(n=len(album), items=items).encode(), "text/html; charset=utf-8")
        elif (picture := album.get(self.path.removeprefix("/pictures/"))) is not None:
            self.answer(200, picture, "application/octet-stream")
        else:
            self.answer(404, b"not found", "text/plain")

    def do_POST(self) -> None:
        """Take an upload."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/upload":
            return self.answer(404, b"not found", "text/plain")
        head = f"Content-Type: {self.headers.get('Content-Type')}\r\n\r\n".encode()
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
        stored = 0
        for part in form.iter_parts() if form.is_multipart() else ():
            if name := part.get_filename():
                album[name.replace("/", "_")] = part.get_payload(decode=True)
                stored += 1
        return self.answer(201 if stored else 200, f"stored {stored}\n".encode(), "text/plain")

    def answer(self, status: int, body: bytes, media_type: str) -> None:
        """Send it."""
        self.send_response(HTTPStatus(status))
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    with ThreadingHTTPServer(("", port), Album) as server:
        print(f"album on port {server.server_port}", flush=True)
        server.serve_forever()
