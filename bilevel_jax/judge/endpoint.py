"""Chat completions over HTTP: asks until there is a reply, and shows the key to the endpoint alone.

The protocol is `POST ENDPOINT/chat/completions` as OpenAI defined it and local servers speak it. Nothing that a server says is
passed on before the key has been cut out of it, redirects are not followed, and loopback addresses are asked without a proxy.
"""

import datetime
import email.utils
import http.client
import ipaddress
import json
import random
import re
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

from bilevel_jax.errors import RunError

ATTEMPTS = 6
LONGEST_DELAY = 60.0  # seconds, of our own accord
LONGEST_WAIT = 300.0  # seconds, at the wish of a server; one that wants more is to be asked another time
PASSING = (408, 425, 429)  # and 500 and above: worth another attempt


class Reply(NamedTuple):
    """What a model said."""

    text: str  # "" where it said nothing
    tokens: tuple[int, int]  # of the request and of the reply, as the server counts them; 0 where it does not


class _Passing(Exception):
    """Trouble that may have passed at the next attempt, and the seconds that the server wants to be left alone."""

    def __init__(self, cause: str, wait: float = 0.0):
        super().__init__(cause)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # urllib would send the key along


def check_endpoint(endpoint: str, key: str | None) -> bool:
    """Whether an endpoint is on this machine.

    Raises:
      ValueError: if it is no address for chat completions, or would get the key unencrypted. The message holds neither.
    """
    if not re.fullmatch(r"https?://[!-~]+", endpoint):
        raise ValueError("the endpoint must have the form http(s)://host[:port]/path")
    parts = urllib.parse.urlsplit(endpoint)
    if parts.port == 0 or not parts.hostname:
        raise ValueError("the endpoint has no host, or the port 0")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("the endpoint must have no user, password, query or fragment")
    try:
        local = ipaddress.ip_address(parts.hostname).is_loopback
    except ValueError:
        local = parts.hostname == "localhost"
    if key and not re.fullmatch("[!-~]+", key):
        raise ValueError("the key has characters that no HTTP header takes, or spaces")
    if key and parts.scheme == "http" and not local:
        raise ValueError(f"the key would go to {parts.hostname} unencrypted; use https, or no key")
    return local


def retry_after(header: str | None, now: datetime.datetime) -> float:
    """Seconds that a Retry-After header asks for, in either of its forms; 0 where it says nothing of use."""
    header = (header or "").strip()
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    return max((date - now).total_seconds(), 0.0)


def _complaint(body: bytes) -> str:
    """What a server says is wrong: the message where its JSON has one, else all it says."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return text
    while isinstance(said, dict):
        said = next((said[name] for name in ("error", "message", "detail") if said.get(name)), text)
    return said if isinstance(said, str) else text


def _read(body: bytes) -> Reply:
    try:
        answer = json.loads(body)
        text = answer["choices"][0]["message"].get("content")
        usage = answer.get("usage") or {}
        tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        if not isinstance(text or "", str) or not all(isinstance(number, int) for number in tokens):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Passing(f"no chat completion, but: {_complaint(body)}") from None
    return Reply(text or "", tokens)


def make_chat(
    endpoint: str,
    key: str | None,
    *,
    timeout: float,
    backoff: float,
    stop: threading.Event,
    notice: Callable[[str], None] = lambda trouble: None,
) -> Callable[[dict], Reply]:
    """A function from the body of a request to the reply. Threads may share it.

    It makes up to ATTEMPTS attempts: after a timeout, a lost connection, a status in PASSING or of 500 and above, or something
    that is no chat completion, it waits for backoff * 2^k seconds (k = 0, 1, ...), less up to half of it at random, or for as long
    as the server asks. It raises a RunError of one line when these are used up, and at once for any other status.

    Args:
      endpoint: what comes before `/chat/completions`.
      key: goes into the Authorization header; None sends none.
      timeout: seconds of silence after which a connection is given up.
      backoff: seconds before the second attempt.
      stop: once set, nothing new is sent, and waiting ends.
      notice: is told of every trouble that leads to another attempt.

    Raises:
      ValueError: see `check_endpoint`.
    """
    proxies = urllib.request.ProxyHandler({} if check_endpoint(endpoint, key) else None)
    opener = urllib.request.build_opener(_NoRedirect, proxies)
    address = endpoint.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json", "User-Agent": "bilevel_jax"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}

    def clean(text: str) -> str:
        return text.replace(key, "[key]") if key else text

    def line(text: str) -> str:
        shown = "".join(character if character.isprintable() else " " for character in clean(text))
        return " ".join(shown.split())[:300]

    def post(data: bytes) -> Reply:
        try:
            with opener.open(urllib.request.Request(address, data, headers), timeout=timeout) as answer:
                reply = _read(answer.read())
        except urllib.error.HTTPError as error:
            try:
                said = _complaint(error.read())
            except (OSError, http.client.HTTPException):
                said = ""
            cause = f"HTTP {error.code}: {said.strip() or error.reason}"
            if error.code in PASSING or error.code >= 500:
                raise _Passing(cause, retry_after(error.headers["Retry-After"], datetime.datetime.now(datetime.UTC))) from None
            if error.code < 400:
                cause = f"HTTP {error.code}: a redirect to {error.headers['Location']}, which is not followed"
            raise RunError(f"{address}: {line(cause)}") from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
            reason = getattr(error, "reason", error)
            cause = f"{type(reason).__name__}: {reason}"
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise RunError(f"{address}: {line(cause)}") from None
            raise _Passing(cause) from None
        return reply._replace(text=clean(reply.text))

    def chat(body: dict) -> Reply:
        data = json.dumps(body).encode()
        for attempt in range(ATTEMPTS):
            if stop.is_set():
                break
            try:
                return post(data)
            except _Passing as trouble:
                cause, wait = line(str(trouble)), trouble.wait
            if wait > LONGEST_WAIT:
                raise RunError(f"{address}: {cause}; it asks to be left alone for {wait:.0f} s")
            if attempt + 1 == ATTEMPTS:
                raise RunError(f"{address}: {cause} (the last of {ATTEMPTS} attempts)")
            notice(cause)
            stop.wait(max(wait, min(backoff * 2**attempt, LONGEST_DELAY) * random.uniform(0.5, 1)))
        raise RunError(f"{address}: stopped")

    return chat
