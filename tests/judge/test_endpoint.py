"""Protocol, retries and protection of the key, against a real server on this machine."""

import contextlib
import datetime
import gzip
import http.server
import json
import socket
import sys
import threading
import time

import pytest

from bilevel_jax.errors import RunError
from bilevel_jax.judge import endpoint as client

KEY = "sk-test-4711/+secret"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Grüße ☃"}], "temperature": 0}


def completion(text, usage=(7, 1)):
    """A reply as in OpenAI's reference."""
    message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    counts = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*usage, sum(usage))))
    return 200, {}, json.dumps({"id": "c1", "object": "chat.completion", "choices": [message], "usage": counts})


class Server(http.server.ThreadingHTTPServer):
    """Answers POSTs by `answer(number, body)` -> (status, headers, text), None to drop the connection; records the requests."""

    daemon_threads = True

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.requests, self.lock = answer, [], threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Silent: in some tests the client is gone."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, self.headers, body, time.monotonic()))
        result = self.server.answer(number, body)
        if result is None:
            return
        status, headers, text = result
        data = text.encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Quiet."""


@contextlib.contextmanager
def serve(answer):
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def make(endpoint, key=KEY, **changes):
    options = {"timeout": 5.0, "backoff": 0.0, "stop": threading.Event()} | changes
    return client.make_chat(endpoint, key, **options)


def test_protocol():
    with serve(lambda number, body: completion("Ja ☃")) as server:
        assert make(server.endpoint + "/")(BODY) == ("Ja ☃", (7, 1))
        make(server.endpoint, None)(BODY)
    (path, headers, body, _), (_, without, _, _) = server.requests
    assert (path, body) == ("/v1/chat/completions", BODY)
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    assert "Authorization" not in without


def test_the_environment_adds_nothing_to_a_request(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "secret of another service")
    with serve(lambda number, body: completion("Ja")) as server:
        make(server.endpoint)(BODY)
        make(server.endpoint, None)(BODY)
    assert [headers["Authorization"] for _, headers, _, _ in server.requests] == [f"Bearer {KEY}", None]
    assert not any("another service" in value for _, headers, _, _ in server.requests for value in headers.values())


def test_without_the_openai_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"pip install 'bilevel_jax\[judge\]'$"):
        client.check_installed()


def slow(number, body):
    time.sleep(1.5)
    return completion("late")


LONG = {"Content-Length": "1000"}  # longer than the body
TRANSIENT = {
    "429": lambda *_: (429, {}, '{"error": {"message": "slow down"}}'),
    "500": lambda *_: (500, {}, "oops"),
    "503": lambda *_: (503, {}, ""),
    "dropped": lambda *_: None,
    "cut off": lambda *_: (200, LONG | {"Connection": "close"}, '{"choices": [{"message"'),
    "cut off in an error": lambda *_: (502, LONG | {"Connection": "close"}, "bad gate"),
    "timeout": slow,
    "no JSON": lambda *_: (200, {}, "<html>welcome</html>"),
    "no choice": lambda *_: (200, {}, '{"error": {"message": "overloaded"}}'),
}


@pytest.mark.parametrize("trouble", TRANSIENT)
def test_transient_errors(trouble):
    causes = []
    with serve(lambda number, body: TRANSIENT[trouble](number, body) if number < 2 else completion("A")) as server:
        assert make(server.endpoint, timeout=1.0, notice=causes.append)(BODY).text == "A"
    assert len(server.requests) == 3 and len(causes) == 2
    assert all(body == BODY for _, _, body, _ in server.requests)


@pytest.mark.parametrize("content, text", [(None, ""), ("", "")])
def test_empty_replies(content, text):
    with serve(lambda *_: completion(content)) as server:
        assert make(server.endpoint)(BODY).text == text
    assert len(server.requests) == 1


def test_backoff_doubles_and_ends(monkeypatch):
    monkeypatch.setattr(client, "ATTEMPTS", 4)
    with serve(TRANSIENT["500"]) as server, pytest.raises(RunError, match=r"HTTP 500: oops \(the last of 4 attempts\)"):
        make(server.endpoint, backoff=0.1)(BODY)
    times = [at for *_, at in server.requests]
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert len(gaps) == 3
    for number, gap in enumerate(gaps):
        assert 0.05 * 2**number <= gap < 0.1 * 2**number + 0.25  # half of it at random, and a busy machine


def test_retry_after_is_obeyed():
    with serve(lambda number, _: completion("A") if number else (429, {"Retry-After": "1"}, "")) as server:
        make(server.endpoint)(BODY)
    assert server.requests[1][-1] - server.requests[0][-1] >= 1

    with serve(lambda *_: (429, {"Retry-After": "9000"}, "come tomorrow")) as server:
        with pytest.raises(RunError, match="come tomorrow; the server asks to wait 9000 s"):
            make(server.endpoint)(BODY)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "header, seconds",
    [
        ("3", 3),
        (None, 0),
        ("", 0),
        ("soon", 0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0),
        ("-5", 0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0),
    ],
)
def test_retry_after_forms(header, seconds):
    assert client.retry_after(header, datetime.datetime(2015, 10, 21, 7, 28, tzinfo=datetime.UTC)) == seconds


@pytest.mark.parametrize(
    "response, message",
    [
        ('{"error": {"message": "max_tokens is not\\nsupported", "code": 1}}', "max_tokens is not supported"),
        ('{"error": "no such model"}', "no such model"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"detail": [{"loc": 1}]}', '{"detail": [{"loc": 1}]}'),
        ("no \x1b[31mroute", "no [31mroute"),
        ("", "Bad Request"),
        (f'{{"error": {{"message": "wrong key {KEY}!"}}}}', "wrong key [key]!"),
        (f"wrong key {KEY}!", "wrong key [key]!"),
    ],
)
def test_permanent_errors_fail_at_once(response, message):
    with serve(lambda *_: (400, {}, response)) as server, pytest.raises(RunError) as error:
        make(server.endpoint)(BODY)
    assert str(error.value) == f"{server.endpoint}/chat/completions: HTTP 400: {message}"
    assert len(server.requests) == 1


def test_the_key_is_removed_from_replies():
    with serve(lambda *_: completion(f"I was given {KEY}.")) as server:
        assert make(server.endpoint)(BODY).text == "I was given [key]."


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status):
    with serve(lambda *_: completion("A")) as other:
        with serve(lambda *_: (status, {"Location": other.endpoint}, "")) as server:
            with pytest.raises(RunError, match=f"HTTP {status}: a redirect to {other.endpoint}, which is not followed"):
                make(server.endpoint)(BODY)
    assert len(server.requests) == 1 and not other.requests


def test_loopback_addresses_use_no_proxy(monkeypatch):
    with serve(lambda *_: completion("proxied")) as proxy, serve(lambda *_: completion("A")) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert make(server.endpoint)(BODY).text == "A"
    assert not proxy.requests


@pytest.mark.parametrize(
    "endpoint, key, complaint",
    [
        ("localhost:8000/v1", None, "form http"),
        ("ftp://host/v1", None, "form http"),
        ("http://host/a b", None, "form http"),
        ("http://:80/v1", None, "no host"),
        ("https://me:pass@host/v1", None, "no user"),
        ("https://host/v1?key=1", None, "no user"),
        ("http://host:99999/v1", None, "ort"),
        ("http://judge.example/v1", KEY, "to judge.example unencrypted"),
        ("http://localhost.example/v1", KEY, "unencrypted"),
        ("https://host/v1", "two words", "HTTP header"),
        ("https://host/v1", KEY + "\n", "HTTP header"),
        ("https://host/v1", "schlüssel", "HTTP header"),
    ],
)
def test_endpoints_that_are_refused(endpoint, key, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        make(endpoint, key)
    for secret in (KEY, "pass@", "key=1", "two words", "schlüssel"):
        assert secret not in str(error.value)


@pytest.mark.parametrize(
    "endpoint, local",
    [
        ("https://judge.example/v1", False),
        ("http://127.0.0.1:8000/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://localhost/v1", True),
    ],
)
def test_endpoints_that_are_accepted(endpoint, local):
    assert client.check_endpoint(endpoint, KEY) is local


def test_http_without_a_key():
    assert client.check_endpoint("http://judge.example/v1", None) is False


def test_stop_ends_the_waiting():
    stop = threading.Event()
    began = time.monotonic()
    with serve(TRANSIENT["500"]) as server, pytest.raises(RunError, match="stopped"):
        make(server.endpoint, backoff=30.0, stop=stop, notice=lambda cause: threading.Timer(0.1, stop.set).start())(BODY)
    assert time.monotonic() - began < 5 and len(server.requests) == 1


def test_nobody_there():
    with serve(lambda *_: None) as server:
        endpoint = server.endpoint
    with pytest.raises(RunError, match="[Rr]efused.*the last of 6 attempts"):
        make(endpoint)(BODY)


# --------------------------------------------------------------------------------------------------------------------
# Hostile servers
# --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve_raw(send):
    """A server that calls `send(connection)` for every connection, after it has read the request."""
    stop = threading.Event()

    def handle(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            send(connection, stop)

    def accept():
        with contextlib.suppress(OSError):  # the server is closed
            while True:
                threading.Thread(target=handle, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        stop.set()
        server.shutdown(socket.SHUT_RDWR)


START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def drip_body(connection, stop):
    connection.sendall(START + b"Content-Length: 1000\r\n\r\n")
    while not stop.wait(0.05):
        connection.sendall(b" ")


def drip_headers(connection, stop):
    connection.sendall(START)
    while not stop.wait(0.05):
        connection.sendall(b"X: y\r\n")


def large_body(connection, stop):
    connection.sendall(START + b"Content-Length: 10000000000\r\n\r\n")
    while not stop.is_set():
        connection.sendall(bytes(1 << 16))


def large_error(connection, stop):
    connection.sendall(START.replace(b"200 OK", b"400 Bad") + b"Content-Length: 10000000000\r\n\r\n")
    while not stop.is_set():
        connection.sendall(bytes(1 << 16))


def packed_body(connection, stop):
    body = gzip.compress(bytes(1 << 21))
    connection.sendall(START + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


@pytest.mark.parametrize(
    "send, timeout, cause",
    [
        (drip_body, 0.4, "no complete response after 0.4 seconds"),
        (drip_headers, 0.4, "no complete response after 0.4 seconds"),
        (large_body, 30, "longer than 1 MB"),
        (large_error, 30, "longer than 1 MB"),
        (packed_body, 30, "compressed"),
    ],
)
def test_hostile_responses(monkeypatch, send, timeout, cause):
    """Without a deadline the first two would never end."""
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    with serve_raw(send) as endpoint, pytest.raises(RunError, match=rf"{cause}.*\(the last of 2 attempts\)"):
        make(endpoint, timeout=timeout)(BODY)


@pytest.mark.parametrize("count", [-1, 2**53, 10**400, True, 1.5])
def test_counts_of_tokens_that_cannot_be(monkeypatch, count):
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    with serve(lambda *_: completion("A", (count, 1))) as server, pytest.raises(RunError, match="no chat completion"):
        make(server.endpoint)(BODY)
