"""Chat completions over HTTP with the `openai` package, with retries that can be stopped.

The key is sent to the endpoint only: redirects are not followed, and loopback addresses are reached without a proxy. The key is
removed from all text that a server returns.
"""

import datetime
import email.utils
import importlib
import importlib.util
import ipaddress
import json
import queue
import random
import re
import ssl
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

from bilevel_jax.errors import RunError

ATTEMPTS = 6
MAX_BACKOFF = 60.0  # seconds
MAX_RETRY_AFTER = 300.0  # seconds; a server that asks for more ends the command
TRANSIENT = (408, 425, 429)  # and 500 and above
MAX_BODY = 1 << 20  # bytes of a response
MAX_COUNT = 1 << 53  # of tokens: larger numbers are no longer exact as JSON


class Reply(NamedTuple):
    """The reply of a model."""

    text: str  # "" if the reply has no text
    tokens: tuple[int, int]  # of the request and of the reply, as counted by the server; 0 if it does not count


class _TransientError(Exception):
    """An error that another attempt may not meet, with the seconds that the server asks to wait."""

    def __init__(self, cause: str, wait: float = 0.0):
        super().__init__(cause)
        self.wait = wait


def check_installed() -> None:
    """Raises a ValueError if the `openai` package is missing."""
    if importlib.util.find_spec("openai") is None:
        raise ValueError("the openai package is not installed: pip install 'bilevel_jax[judge]'")


def check_endpoint(endpoint: str, key: str | None) -> bool:
    """Checks an endpoint, and returns whether it is on this machine.

    Raises:
      ValueError: the address or the key is invalid, or the key would be sent unencrypted. The message contains no secret.
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
        raise ValueError("the key has spaces or characters that are not allowed in an HTTP header")
    if key and parts.scheme == "http" and not local:
        raise ValueError(f"the key would go to {parts.hostname} unencrypted; use https, or no key")
    return local


def retry_after(header: str | None, now: datetime.datetime) -> float:
    """Seconds that a Retry-After header asks to wait, as a number or a date; 0 if it is missing or invalid."""
    header = (header or "").strip()
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
        date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
        return max((date - now).total_seconds(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _error_message(body: bytes) -> str:
    """The error message in the body of a response, or the complete body if there is none."""
    text = body.decode(errors="replace")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return text
    while isinstance(message, dict):
        message = next((message[name] for name in ("error", "message", "detail") if message.get(name)), text)
    return message if isinstance(message, str) else text


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value can be a number of tokens."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_COUNT


def _parse_completion(body: bytes) -> Reply:
    try:
        completion = json.loads(body)
        text = completion["choices"][0]["message"].get("content")
        usage = completion.get("usage") or {}
        tokens = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
        if not isinstance(text or "", str) or not all(map(is_count, tokens)):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _TransientError(f"the response is no chat completion: {_error_message(body)}") from None
    return Reply(text or "", tokens)


def _is_certificate_error(error: BaseException | None) -> bool:
    """Whether a certificate that cannot be verified caused an error."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _limit_body(response) -> None:
    """Limits a response of httpx before its body is read."""
    httpx = importlib.import_module(type(response).__module__.partition(".")[0])  # or httpx2, of later versions of `openai`
    stream_type: Any = httpx.SyncByteStream

    class Limited(stream_type):
        """The stream of the response, which fails after MAX_BODY bytes."""

        def __init__(self, stream):
            self._stream = stream

        def __iter__(self):
            size = 0
            for part in self._stream:
                size += len(part)
                if size > MAX_BODY:
                    raise _TransientError(f"the response is longer than {MAX_BODY >> 20} MB")
                yield part

        def close(self) -> None:
            self._stream.close()

    if response.headers.get("Content-Encoding", "identity") != "identity":  # it could unpack to any size
        raise _TransientError("the response is compressed, for which nobody asked")
    response.stream = Limited(response.stream)


def _within(seconds: float, call: Callable[[], Reply]) -> Reply:
    """`call()`, in a thread that is left alone after `seconds`: a server may send one byte at a time for ever.

    Raises:
      _TransientError: there is no result after `seconds`.
      Exception: what `call` raises.
    """
    result: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            result.put((call(), None))
        except Exception as error:  # raised again below
            result.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        reply, error = result.get(timeout=seconds)
    except queue.Empty:
        raise _TransientError(f"no complete response after {seconds:g} seconds") from None
    if error is not None:
        raise error
    return reply


def _make_post(endpoint: str, key: str | None, timeout: float) -> Callable[[dict], Reply]:
    """A function that makes one attempt. It raises `_TransientError`, or RunError with a cause that may contain the key."""
    import openai

    local = check_endpoint(endpoint, key)
    # The package would take these headers from environment variables.
    omitted = ("OpenAI-Organization", "OpenAI-Project", *(() if key else ("Authorization",)))
    headers = {"User-Agent": "bilevel_jax", "Accept-Encoding": "identity"} | dict.fromkeys(omitted, openai.Omit())
    client = openai.OpenAI(
        api_key=key or "none",
        base_url=endpoint,
        timeout=timeout,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(follow_redirects=False, trust_env=not local, event_hooks={"response": [_limit_body]}),
    )

    def post(body: dict) -> Reply:
        required = {name: body[name] for name in ("model", "messages")}
        options = {name: value for name, value in body.items() if name not in required}
        try:
            create = client.chat.completions.with_raw_response.create
            response = create(**required, extra_headers=headers, extra_body=options).http_response
        except openai.APIStatusError as error:
            response, code = error.response, error.status_code
            cause = f"HTTP {code}: {_error_message(response.content).strip() or response.reason_phrase}"
            if code in TRANSIENT or code >= 500:
                wait = retry_after(response.headers.get("Retry-After"), datetime.datetime.now(datetime.UTC))
                raise _TransientError(cause, wait) from None
            if code < 400:
                cause = f"HTTP {code}: a redirect to {response.headers.get('Location')}, which is not followed"
            raise RunError(cause) from None
        except openai.APIConnectionError as error:  # includes timeouts
            reason = error.__cause__ or error
            if isinstance(reason, _TransientError):
                raise reason from None
            cause = f"{type(reason).__name__}: {reason}"
            if _is_certificate_error(reason):
                raise RunError(cause) from None
            raise _TransientError(cause) from None
        return _parse_completion(response.content)

    return post


def make_chat(
    endpoint: str,
    key: str | None,
    *,
    timeout: float,
    backoff: float,
    stop: threading.Event,
    notice: Callable[[str], None] = lambda cause: None,
) -> Callable[[dict], Reply]:
    """Returns a thread-safe function from the body of a request to the reply.

    The function makes up to ATTEMPTS attempts. After a timeout, a lost connection, a status in TRANSIENT or of 500 and above, or a
    response that is no chat completion, it waits for backoff * 2^k seconds (k = 0, 1, ...), reduced by up to half at random, or as
    long as the server asks. It raises a RunError of one line after the last attempt, and at once for any other status.

    Args:
      endpoint: the URL before `/chat/completions`.
      key: sent in the Authorization header; None sends no header.
      timeout: seconds until an attempt fails, whatever the server sends meanwhile.
      backoff: seconds before the second attempt.
      stop: once it is set, no request is sent and waiting ends.
      notice: called with the cause of every failed attempt that is repeated.

    Raises:
      ValueError: see `check_endpoint`.
    """
    post = _make_post(endpoint, key, timeout)
    address = endpoint.rstrip("/") + "/chat/completions"

    def without_key(text: str) -> str:
        return text.replace(key, "[key]") if key else text

    def one_line(error: Exception) -> str:
        text = "".join(character if character.isprintable() else " " for character in without_key(str(error)))
        return " ".join(text.split())[:300]

    def chat(body: dict) -> Reply:
        for attempt in range(ATTEMPTS):
            if stop.is_set():
                break
            try:
                reply = _within(timeout, lambda: post(body))
                return reply._replace(text=without_key(reply.text))
            except RunError as error:
                raise RunError(f"{address}: {one_line(error)}") from None
            except _TransientError as error:
                cause, wait = one_line(error), error.wait
            if wait > MAX_RETRY_AFTER:
                raise RunError(f"{address}: {cause}; the server asks to wait {wait:.0f} s")
            if attempt + 1 == ATTEMPTS:
                raise RunError(f"{address}: {cause} (the last of {ATTEMPTS} attempts)")
            notice(cause)
            stop.wait(max(wait, min(backoff * 2**attempt, MAX_BACKOFF) * random.uniform(0.5, 1)))
        raise RunError(f"{address}: stopped")

    return chat
