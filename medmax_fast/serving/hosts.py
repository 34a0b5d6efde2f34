"""Names by which a server on this machine may be called.

A page of another site can have its own name lead to this machine and then talk to a server here as if it were its own
(DNS rebinding); its browser still sends that name as the Host.
"""

import re
from collections.abc import Collection


def is_one_of(host: str, names: Collection[str]) -> bool:
    """Whether a Host header, with or without a port, has one of these names."""
    name = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", host)
    return name is not None and name[1].strip("[]").lower() in names


class HostCheck:
    """ASGI middleware: status 403, or the end of a web socket, for requests by another name."""

    def __init__(self, app, names: Collection[str]):
        self._app, self._names = app, names

    async def __call__(self, scope, receive, send) -> None:
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] not in ("http", "websocket") or is_one_of("".join(hosts), self._names):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"not a name of this server"})
