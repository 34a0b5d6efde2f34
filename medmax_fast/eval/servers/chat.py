"""A client of the OpenAI chat-completions protocol (POST {url}/chat/completions), for models under test and judges.

Every ask is greedy (temperature 0, seed 0), is tried again while there is hope, and its reply is kept in a file, so a
run that ends early pays for nothing twice. Failures are of three kinds: those that may be gone the next time (server
down, rate limit, a proxy's nonsense), those of one request (refused content), and those that end the run (wrong key,
unknown model, no money left). A server that refuses `max_tokens`, `temperature`, `seed` or `modalities` is asked
without it from then on, and facts() says so.

Keys live in the client's headers only; what a server says is searched for them before it is shown or kept.
"""

import base64
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from medmax_fast.eval.servers.chat_reply import (
    NotAReply,
    Reply,
    Secrets,
    error_of,
    parse_reply,
    read_reply,
    refused_parameter,
    seconds_to_wait,
    write_reply,
)
from medmax_fast.eval.servers.spending import Meter
from medmax_fast.runtime import InputError, log

RETRIED = (408, 409, 429)
# By the flag that names a server: that of its model's price, and the variables that hold its key.
PRICE_FLAGS = {"--api-url": "--price", "--judge-url": "--judge-price"}
KEY_NAMES = {"--api-url": "OPENAI_API_KEY", "--judge-url": "MEDMAX_JUDGE_API_KEY or OPENAI_API_KEY"}
# What ends the run only before a server has answered anything.
DOUBTED = (401, 403, 404)
# Asks in a row that get no answer after all their tries, before a server is taken for gone.
SILENCE = 16
MAX_WAIT = 60.0
CHECK_SECONDS = 10.0
# More than any reply with pictures; a server that never stops talking must not fill the memory.
MAX_BODY = 1 << 28
# What a server may do without; max_tokens then goes on as max_completion_tokens.
MAY_GO = ("max_tokens", "temperature", "seed", "modalities")


class ChatError(Exception):
    """No reply to this request; `passing` says whether another time may bring one."""

    def __init__(self, message: str, passing: bool):
        super().__init__(message)
        self.passing = passing


class _Failed(Exception):
    """One request without a reply, to be tried again after so many seconds at least."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


def key_from_environment(*names: str) -> str:
    """The first of these environment variables that is set and not empty, "" if none is."""
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")


class ChatClient:
    """One server and one model, for any number of threads.

    url: the base, such as https://api.openai.com/v1, which messages call `flag`; a user and password in it are sent as
    basic authentication in place of the key. cache: folder of replies, which processes may share. timeout: seconds
    for a whole reply. tries: requests per ask, with waits of up to backoff * 2^n seconds between them. prices: USD per
    million tokens (in, out). InputError for a bad address or key, for a budget without prices, if httpx is missing.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        *,
        cache: Path | None,
        timeout: float = 120.0,
        tries: int = 8,
        prices: tuple[float, float] | None = None,
        meter: Meter | None = None,
        backoff: float = 1.0,
        flag: str = "--api-url",
    ):
        self.model, self.meter = model, meter or Meter()
        self._flag, self._cache, self._prices = flag, cache, prices
        self._timeout, self._tries, self._backoff = timeout, tries, backoff
        key = key.strip()
        self.url, login, self._query = _split(url, flag)
        encoded = base64.b64encode(":".join(login).encode()).decode()
        self._secrets = Secrets(key, encoded, *login[1:], *(value for _, value in self._query))
        if self.meter.budget and prices is None:
            limit = f"--budget {self.meter.budget:g}"
            raise InputError(f"{limit}: the price of {model!r} is not known, give it with {PRICE_FLAGS[flag]}")
        self._http = _open(self.url, flag, key, login, timeout)
        self._lock, self._stopped = threading.Lock(), threading.Event()
        # Whether this server has ever answered, and how many asks have gone unanswered since it last did.
        self._answered, self._unanswered = False, 0
        self._has_key = bool(key or login)
        # The sequence of random.random() belongs to those who seed it.
        self._random = random.Random()
        self._dropped: set[str] = set()
        self._reported: set[str] = set()

    def check(self) -> None:
        """One GET of {url}/models, to learn of a wrong address or key early: InputError. Servers need not have it."""
        import httpx

        timeout = min(self._timeout, CHECK_SECONDS)
        try:
            response = self._http.get(f"{self.url}/models", params=self._query, timeout=timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise InputError(f"{self._flag} {self.url}: no server found there ({self._reason(error)})") from error
        except httpx.HTTPError:
            return
        # A key may be good for chats alone, which is a 403 here.
        if response.status_code not in (403, 404, 405):
            self._end_if_hopeless(response.status_code, response.headers, response.content)

    def ask(self, messages: list[dict], max_tokens: int, **extra) -> Reply:
        """The reply to these messages, from the cache or the server; `extra` goes into the request as it is.

        Raises ChatError for this request, InputError (BudgetSpent among them) for the whole run.
        """
        path = self._path(messages, max_tokens, extra)
        if path and (found := read_reply(path)):
            reply, dropped = found
            self.meter.count_cached()
            # So that a run read from the cache alone says of itself what the first one did.
            self._learn(reply.model, dropped)
            return reply
        reply = self._ask_server(messages, max_tokens, extra)
        dropped = self._learn(reply.model)
        if path:
            write_reply(path, reply, dropped, self.model, messages, max_tokens)
        if reply.unfetched:
            log(f"{self.url}: a reply names {reply.unfetched} pictures by address, which are not fetched")
        self.meter.count_tokens(reply.prompt_tokens, reply.completion_tokens, self._prices, self.model)
        return reply

    def facts(self) -> dict:
        """What a report says of this client; all that differs between equal runs is in `usage`."""
        with self._lock:
            reported, dropped = sorted(self._reported - {""}), sorted(self._dropped)
        facts = {"model": self.model, "url": [self.url], "reported": reported, "dropped": dropped}
        return {**facts, "usage": self.meter.usage()}

    def stop(self) -> None:
        """Let no ask begin and no ask try again from now on; those in flight end, and are kept."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and close the connections."""
        self.stop()
        self._http.close()

    # ---- requests ----

    def _ask_server(self, messages: list[dict], max_tokens: int, extra: dict) -> Reply:
        failures = 0
        while not self._stopped.is_set():
            self.meter.check()
            self.meter.count_call(retry=failures > 0)
            try:
                reply = self._try(messages, max_tokens, extra)
            except _Failed as error:
                failures += 1
                if failures >= self._tries:
                    message = f"{self.url}: no answer after {failures} tries, the last: {error}"
                    self._give_up(message)
                    raise ChatError(message, passing=True) from error
                spread = self._random.uniform(0, min(MAX_WAIT, self._backoff * 2 ** (failures - 1)))
                self._stopped.wait(min(MAX_WAIT, error.wait + spread))
            else:
                if reply:
                    self._unanswered = 0
                    return reply
        raise ChatError("stopped before an answer came", passing=True)

    def _give_up(self, message: str) -> None:
        """InputError where the server has answered nothing for long: waiting on, request by request, may take days."""
        with self._lock:
            self._unanswered += 1
        if self._unanswered >= SILENCE:
            raise InputError(f"{self._flag} {message}; so it went {SILENCE} times in a row. What was answered is kept")

    def _try(self, messages: list[dict], max_tokens: int, extra: dict) -> Reply | None:
        """One request; None if the next one will look different, _Failed if the same one may be answered."""
        with self._lock:
            dropped = set(self._dropped)
        limit = "max_completion_tokens" if "max_tokens" in dropped else "max_tokens"
        # The wish for pictures, which few servers know, is the one of the extras that may go.
        kept = extra.keys() - {"modalities"}
        body = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0, limit: max_tokens} | extra
        body = {name: value for name, value in body.items() if name in kept or name not in dropped}
        status, headers, content = self._post(json.dumps(body).encode())
        if 200 <= status < 300:
            try:
                reply = parse_reply(content, self._secrets.reply)
                self._answered = True
                return reply
            except NotAReply as error:
                raise _Failed(self._secrets.line(str(error))) from error
        # Another thread may have dropped it since this request was made, so the request decides.
        refused = refused_parameter(status, content, [name for name in MAY_GO if name in body and name not in kept])
        if refused:
            if refused not in dropped:
                log(f"{self.url}: {self.model} does not take {refused}, going on without it")
            self._learn("", [refused])
            return None
        if not (self._answered and status in DOUBTED):
            self._end_if_hopeless(status, headers, content)
        if status in RETRIED or status >= 500:
            raise _Failed(self._describe(status, content), seconds_to_wait(headers.get("retry-after", "")))
        # A refusal of this content, or of a key or a place that has served before and may serve again.
        self._unanswered, said = 0, self._describe(status, content)
        raise ChatError(said, passing=status in DOUBTED and "flagged" not in said)

    def _post(self, body: bytes):
        """(status, headers, content) of a response; _Failed where none came whole."""
        import httpx

        deadline, content = time.monotonic() + self._timeout, bytearray()
        arguments = {"params": self._query, "content": body, "headers": {"Content-Type": "application/json"}}
        try:
            with self._http.stream("POST", f"{self.url}/chat/completions", **arguments) as response:
                for piece in response.iter_bytes():
                    content += piece
                    # httpx's own time-out begins anew with every piece.
                    if time.monotonic() > deadline or len(content) > MAX_BODY:
                        raise _Failed(f"a reply without end, {len(content)} bytes in {self._timeout:g} s")
                return response.status_code, response.headers, bytes(content)
        except httpx.HTTPError as error:
            raise _Failed(self._reason(error)) from error

    def _end_if_hopeless(self, status: int, headers, content: bytes) -> None:
        """InputError where no request of this run will be answered."""
        where, said = f"{self._flag} {self.url}", self._describe(status, content)
        # OpenRouter's 403 for content that it does not let through concerns one request.
        if status == 401 or (status == 403 and "flagged" not in said):
            what = "the server refuses the key of" if self._has_key else "the server wants a key, set"
            raise InputError(f"{where}: {what} {KEY_NAMES[self._flag]} ({said})")
        if status == 404:
            raise InputError(f"{where}: no model {self.model!r} or no chat completions there ({said})")
        if status == 402 or (status == 429 and "insufficient_quota" in said):
            raise InputError(f"{where}: the account has no credit left ({said})")
        if 300 <= status < 400:
            place = self._secrets.line(headers.get("location", "nowhere"))
            raise InputError(f"{where}: sends requests on to {place} ({status}), expected the API's own address")

    def _learn(self, model: str, dropped: Sequence[str] = ()) -> list[str]:
        """Note what a reply tells of the server; returns all parameters dropped so far."""
        with self._lock:
            self._reported.add(model)
            self._dropped.update(dropped)
            return sorted(self._dropped)

    def _describe(self, status: int, content: bytes) -> str:
        message, code, _ = error_of(content)
        return self._secrets.line(f"{status}{code and ' '}{code}: {message}")

    def _reason(self, error: Exception) -> str:
        return self._secrets.line(f"{type(error).__name__} {error}".strip())

    def _path(self, messages: list[dict], max_tokens: int, extra: dict) -> Path | None:
        if self._cache is None:
            return None
        whole = [self.url, self.model, messages, max_tokens, extra]
        name = hashlib.sha256(json.dumps(whole, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        return Path(self._cache) / name[:2] / f"{name}.json"


def _split(url: str, flag: str) -> tuple[str, list[str], list[tuple[str, str]]]:
    """(address without user and query, [user, password] or [], query) of a base URL."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        # Blanks are a slip, and @ in a path is what a / in a password makes of it.
        good = good and not re.search(r"\s", url) and "@" not in parts.path
    except ValueError:
        good = False
    if not good:
        # Not shown, since it may hold a password.
        raise InputError(f"{flag}: not an http address, expected one such as https://api.openai.com/v1")
    login, _, host = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{host}{path}", [unquote(user), unquote(password)] if login else [], parse_qsl(parts.query)


def _open(url: str, flag: str, key: str, login: list[str], timeout: float):
    """An httpx.Client that sends the key or the login."""
    try:
        import httpx
    except ImportError as error:
        raise InputError("httpx is missing, needed to ask a server: pip install 'medmax_fast[eval]'") from error
    if not re.fullmatch(r"[!-~]*", key):
        raise InputError("the API key holds blanks or other characters that no key has")
    headers = {"Authorization": f"Bearer {key}"} if key and not login else {}
    try:
        httpx.URL(url)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        auth = (login[0], login[1]) if login else None
        return httpx.Client(headers=headers, auth=auth, timeout=timeout, limits=limits)
    except httpx.InvalidURL as error:
        raise InputError(f"{flag} {url}: not an address ({error})") from error
    except (ImportError, ValueError) as error:
        raise InputError(f"the proxy that the environment names cannot be used ({error})") from error
