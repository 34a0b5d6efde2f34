"""`medmax serve`: a checkpoint behind an HTTP server, until Ctrl-C or SIGTERM."""

import contextlib
import ipaddress
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import NoReturn

from medmax_fast.config import ServeConfig
from medmax_fast.generate.engine import Engine
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.runtime import InputError, log, require_at_least
from medmax_fast.serving.dispatcher import Dispatcher
from medmax_fast.serving.replies import Counts
from medmax_fast.serving.uploads import Uploads

KEY_NAME = "MEDMAX_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Seconds between two looks at whether all is still running, and those that a client has to take the end of its answer.
_PULSE, _FAREWELL = 0.5, 3
# Connections at a time; more are told to come later, with status 503.
_CONNECTIONS = 1024


class Terminated(BaseException):
    """SIGTERM came, or the terminal was closed; like an interrupt it is nobody's error to handle."""


def serve(config: ServeConfig) -> dict:
    """Answer requests until SIGTERM, then return a summary; Ctrl-C ends it in the same way, as an interrupt."""
    require_at_least(config, 1, "batch_size")
    require_at_least(config, 0, "waiting", "cache_gb")
    counts, begun = Counts(), time.monotonic()
    try:
        with sigterm_raises(), listening(config.host, config.port) as listener:
            _serve(config, listener, counts)
    except Terminated:
        return {**asdict(counts), "seconds": round(time.monotonic() - begun, 1)}
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the server has ended, requests answered: {counts.answered}") from stop


def _serve(config: ServeConfig, listener: socket.socket, counts: Counts) -> NoReturn:
    try:
        import uvicorn  # noqa: F401

        from medmax_fast.serving.app import Service
    except ImportError as error:
        raise InputError(f"{error.name} is missing, needed to serve: pip install 'medmax_fast[serve]'") from error
    key, hosts = key_from_environment(), names_of(listener)
    with Uploads(config.max_upload_mb, config.max_pixels) as uploads:
        checkpoint = open_checkpoint(config.ckpt, config.vqgan)
        engine = Engine.from_checkpoint(checkpoint, config.device, config.precision, config.quantize, config.cache_gb)
        if not (key or hosts):
            log(f"medmax serve: whoever reaches {config.host} may use this server; {KEY_NAME} gives it a key")
        dispatcher = Dispatcher(engine, config.batch_size, config.waiting)
        service = Service(engine, dispatcher, uploads, config, counts, key, hosts)
        # The dispatcher is closed first, which ends all answers; the web server waits for them.
        with running(service, listener) as web, dispatcher:
            print(f"{service.name}: {url_of(listener)}/v1 (Ctrl-C ends it)", flush=True)
            while web.is_alive() and dispatcher.alive:
                time.sleep(_PULSE)
    raise RuntimeError("the engine or the web server has stopped, as told above")


def key_from_environment() -> str:
    """The key that clients must send, "" for none; InputError for one that no header can carry."""
    key = os.environ.get(KEY_NAME)
    if key is not None and not re.fullmatch(r"[!-~]+", key.strip()):
        raise InputError(f"{KEY_NAME} is empty or holds blanks or other characters that no key has; unset it for none")
    return (key or "").strip()


# ---- listening ----


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there, on any free port for 0; InputError for an address that cannot be had."""
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port}: expected 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InputError(f"--host {host}: no such address, expected one such as 127.0.0.1 or 0.0.0.0") from error
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from error


def names_of(listener: socket.socket) -> tuple[str, ...]:
    """The names that a server which only this machine reaches goes by; none for one that others reach."""
    address = listener.getsockname()[0]
    return tuple({*LOOPBACK, address}) if ipaddress.ip_address(address).is_loopback else ()


def url_of(listener: socket.socket) -> str:
    """The http address of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def running(app, listener: socket.socket) -> Iterator[threading.Thread]:
    """The thread of a web server for an ASGI application; on leaving it takes no more and ends what it answers."""
    import uvicorn

    options = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=_FAREWELL,
    )
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="medmax web")
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM and SIGHUP as a Terminated for the time of the context, so that what is open is closed.

    In the main thread only. One that is ignored, as nohup has it for a closed terminal, stays so.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _terminate) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(*_) -> NoReturn:
    raise Terminated
