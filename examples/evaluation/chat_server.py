"""A chat-completions server on this machine for tests, as unreliable as asked for, the same way every time.

    with serve(lambda body: "yes", fail=0.3, nonsense=0.05) as server:
        ... ChatClient(server.url, "model", ...)

Whether and how a call fails depends on the seed, the request's body and how often that body came before, so a run meets
the same failures in whatever order its threads ask.
"""

import contextlib
import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "served-model-1"
# With shares below 1 a body is answered at the latest now, so that no client runs out of tries by bad luck.
PATIENCE = 5
FAILURES = ("429", "500", "503", "closed")
NONSENSE = ((200, "<html>gateway</html>"), (200, {"object": "list"}), (200, {"choices": []}))


class ChatServer(ThreadingHTTPServer):
    """url: base for a client. requests: {"path", "body", "headers"} of every POST. counts: Counter of what was said."""

    daemon_threads = True
    # Connections that wait to be accepted; the default of 5 makes some of them wait a second for their repetition.
    request_queue_size = 128

    def __init__(self, answer: Callable, fail: float, nonsense: float, slow: float, seed: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.answer, self.seed = answer, seed
        self.requests: list[dict] = []
        self.counts: Counter = Counter()
        self.slow = slow
        self.ended = threading.Event()
        self._fail, self._nonsense = fail, nonsense
        self._attempts: Counter = Counter()
        self._lock = threading.Lock()

    def record(self, path: str, raw: bytes, headers: dict) -> str:
        """Keep a request; returns how to treat it: one of FAILURES, `slow`, `nonsense0`... or `answered`."""
        with self._lock:
            self.requests.append({"path": path, "body": json.loads(raw), "headers": headers})
            attempt = self._attempts[raw]
            self._attempts[raw] += 1
            digest = hashlib.sha256(f"{self.seed} {attempt} ".encode() + raw).digest()
            share = int.from_bytes(digest[:4], "big") / 2**32
            kinds = FAILURES + ("slow",) if self.slow else FAILURES
            kind = "answered"
            if attempt < PATIENCE or self._fail + self._nonsense >= 1:
                if share < self._fail:
                    kind = kinds[digest[4] % len(kinds)]
                elif share < self._fail + self._nonsense:
                    kind = f"nonsense{digest[4] % len(NONSENSE)}"
            self.counts[kind] += 1
            return kind

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are no errors; a traceback of answer() is worth seeing."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body in one packet, or every reply would wait for an acknowledgement.
    wbufsize = -1
    server: ChatServer

    def do_GET(self) -> None:
        if self.path.split("?")[0].endswith("/models"):
            self._send(200, {"object": "list", "data": [{"id": MODEL}]})
        else:
            self._send(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.server.record(self.path, raw, dict(self.headers))
        if kind == "closed":
            self.close_connection = True
        elif kind == "429":
            self._send(429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, {"Retry-After": "0"})
        elif kind in FAILURES:
            self._send(int(kind), "Service trouble")
        elif kind.startswith("nonsense"):
            self._send(*NONSENSE[int(kind[-1])])
        else:
            if kind == "slow":
                self.server.ended.wait(self.server.slow)
            # A client that gave up has closed the connection.
            with contextlib.suppress(ConnectionError):
                self._send(*_response(json.loads(raw), self.server.answer))
                self.wfile.flush()

    def _send(self, status: int, body: dict | str, headers: dict | None = None) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def _response(body: dict, answer: Callable) -> tuple:
    """(status, body) or (status, body, headers) of what answer() says to a request."""
    said = answer(body)
    if isinstance(said, tuple):
        return said
    message = {"role": "assistant", **(said if isinstance(said, dict) else {"content": said})}
    text = message["content"] if isinstance(message.get("content"), str) else ""
    # A token a word is as good as any count.
    usage = {"prompt_tokens": len(json.dumps(body["messages"]).split()), "completion_tokens": len(text.split())}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return 200, {"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}


@contextlib.contextmanager
def serve(
    answer: Callable[[dict], str | list | dict | tuple],
    fail: float = 0.0,
    nonsense: float = 0.0,
    slow: float = 0.0,
    seed: int = 0,
) -> Iterator[ChatServer]:
    """A running server. answer: from a request's body to the message's content, or to a message as a dict, or to
    (status, body) or (status, body, headers) of a raw response. fail, nonsense: shares of calls. slow: seconds that
    some of the failing calls are kept waiting, 0 for none of this kind.
    """
    server = ChatServer(answer, fail, nonsense, slow, seed)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
