"""A receiver of webhooks on this machine; the path says how it behaves."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE_S = 30.0


@dataclass
class Received:
    """A message as it came in."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """`/ok` takes a message, `/slow` does not answer until the end, `/redirect` points to `/ok`; a number is a status.

    Attributes:
        statuses: what paths answer instead, one by one.
    """

    url: str
    received: list[Received] = field(default_factory=list)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    ended: threading.Event = field(default_factory=threading.Event)

    def at(self, path: str) -> list[Received]:
        """What has come in at a path."""
        return [each for each in self.received if each.path == path]


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.received.append(Received(self.path, headers, body))
            if self.path == "/slow":
                receiver.ended.wait(PATIENCE_S)
                return
            self.send_response(self._status())
            if self.path == "/redirect":
                self.send_header("location", f"{receiver.url}/ok")
            self.send_header("content-length", "0")
            self.end_headers()

        def _status(self) -> int:
            if planned := receiver.statuses.get(self.path):
                return planned.pop(0)
            return {"/ok": 200, "/redirect": 307}.get(self.path) or int(self.path[1:])

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def is_signed(message: Received, secret: str) -> bool:
    """Whether the message carries the signature that Standard Webhooks describes; written from its text alone."""
    key = base64.b64decode(secret[len("whsec_") :])
    content = b".".join([message.headers["webhook-id"].encode(), message.headers["webhook-timestamp"].encode()])
    expected = b"v1," + base64.b64encode(hmac.digest(key, content + b"." + message.body, hashlib.sha256))
    return expected in message.headers["webhook-signature"].encode().split(b" ")
