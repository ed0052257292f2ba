"""The judge's way there and back, over real HTTP: what is sent, what a failure costs, what stays on disk."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from judge_server import FAULTS, MODEL, NO_CHOICES, NOT_JSON, SILENCE, JudgeServer, completion

from stic_min import InputError
from stic_min.scorers import judge
from stic_min.scorers.judge import Judge, Reply, read_reply

KEY = "sk-not-to-be-seen"
ASKED = [{"role": "user", "content": "How good is this?"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(judge, "WAIT", 0.01)


@pytest.fixture
def new(tmp_path):
    """new(server or URL, ...) -> a judge with the same file as those before; what it says goes to new.said."""

    def new(to, key=KEY, model="gpt-4-0613", timeout=10, **more):
        progress = lambda total: SimpleNamespace(add=lambda: new.steps.append(total))
        return Judge(getattr(to, "url", to), key, model, tmp_path / "a.judge.jsonl", texts={}, runs=1, timeout=timeout,
                     progress=progress, warn=new.said.append, **more)  # fmt: skip

    new.said, new.steps, new.path = [], [], tmp_path / "a.judge.jsonl"
    return new


def ask(asking, where="q1", messages=ASKED, temperature=0.2, max_tokens=1024):
    return asking.ask(where, messages, temperature=temperature, max_tokens=max_tokens)


def stored(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- one request


@pytest.mark.parametrize("ending", ["", "/"])
def test_request_and_reply(new, ending):
    with JudgeServer(verdict=lambda body: "8 9\nGood: é.") as server:
        asking = new(server.url + ending)
        assert ask(asking) == Reply("8 9\nGood: é.", MODEL) and asking.served == {MODEL}
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}" and request.headers["Content-Type"] == "application/json"
    assert request.body == {"model": "gpt-4-0613", "messages": ASKED, "temperature": 0.2, "max_tokens": 1024}
    assert new.said == []


@pytest.mark.parametrize("body, reply", [
    (completion("8 9"), Reply("8 9", MODEL)), (completion(None), Reply("", MODEL)), (completion(""), Reply("", MODEL)),
    ('{"choices": [{"message": {"role": "assistant", "refusal": "No."}}]}', Reply("", "unnamed")),
    ('{"choices": [{"message": {"content": null}}], "model": 5}', Reply("", "unnamed")),
    ('{"choices": [{"message": {"content": [{"type": "text", "text": "8 "}, {"type": "text", "text": "9"}]}}], '
     '"model": "m\\ud800"}', Reply("8 9", "m?")),
    (completion("<think>\nIs 7 7 too low?\n</think>\n\n8 9\nGood."), Reply("8 9\nGood.", MODEL)),
    (completion("Is 7 7 too low?\n</think>\n8 9"), Reply("8 9", MODEL)), (completion("<think>Is 7"), Reply("", MODEL)),
    (completion("\n<think>\n"), Reply("", MODEL)), (completion("8 9\nI <think>."), Reply("8 9\nI <think>.", MODEL)),
    ('{"choices": [{"message": {"reasoning_content": "Is 7 7", "content": "\\n\\n8 9"}, "finish_reason": "stop"}]}',
     Reply("8 9", "unnamed")), (completion("\n8 9"), Reply("\n8 9", MODEL)),
    ('{"choices": [{"message": {"content": "8"}, "finish_reason": "length"}]}', Reply("8", "unnamed", True)),
    ('{"choices": [{"message": {"content": "1"}}, {"message": {"content": "2"}}]}', Reply("1", "unnamed"))])
def test_what_a_reply_holds(body, reply):
    assert read_reply(body) == reply


@pytest.mark.parametrize("body", ["", "8 9", NOT_JSON, NO_CHOICES, "[]", "null", '{"choices": []}', '{"choices": [5]}',
                                  '{"choices": [{"text": "8 9"}]}', '{"choices": {"message": 1}}', "[" * 100_000])
def test_what_is_no_reply(body):
    with pytest.raises(ValueError, match="not a chat completion"):
        read_reply(body)


def test_a_filtered_reply_is_empty_and_not_asked_for_again(new):
    with JudgeServer(verdict=lambda body: None) as server:
        assert ask(new(server)).content == "" and len(server.requests) == 1


def test_what_newer_endpoints_ask_for(new):
    """Another limit, its other name, no temperature. The default request is what it was, so stored replies stay."""
    with JudgeServer(verdict=lambda body: "8 9") as server:
        for more in {}, {"max_tokens": 4096}, {"token_field": "max_completion_tokens"}, {"temperature": False}:
            ask(new(server, **more))
        bodies = [request.body for request in server.requests]
    fixed = {"model": "gpt-4-0613", "messages": ASKED}
    assert bodies == [fixed | own for own in (
        {"temperature": 0.2, "max_tokens": 1024}, {"temperature": 0.2, "max_tokens": 4096},
        {"temperature": 0.2, "max_completion_tokens": 1024}, {"max_tokens": 1024})]  # fmt: skip
    first, *others = stored(new.path)
    text = json.dumps(fixed | {"temperature": 0.2, "max_tokens": 1024})
    url = f"{server.url}/chat/completions"
    assert first["request"] == hashlib.sha256(f"{url}{text}".encode()).hexdigest()[:16]
    assert first["request"] not in {line["request"] for line in others}


# ---- failures

SAID = {
    429: 'HTTP 429 {"error": "not now"}', 500: 'HTTP 500 {"error": "not now"}', 503: 'HTTP 503 {"error": "not now"}',
    NOT_JSON: f"not a chat completion: '{NOT_JSON}'", NO_CHOICES: f"not a chat completion: '{NO_CHOICES}'",
    "half": "the connection ended 960 bytes too early", SILENCE: "timed out",
    "hang up": "Remote end closed connection without response"}  # fmt: skip


@pytest.mark.parametrize("fault", SAID)
def test_a_failed_try_is_reported_in_one_line_and_tried_again(new, fault):
    with JudgeServer([fault], every=1) as server:
        assert ask(new(server, timeout=1)).content and len(server.requests) == 2
    assert new.said == [f"judge, q1: {SAID[fault]}; try 2 of 8 in 0 s"]


def test_an_endpoint_that_is_not_there(new, monkeypatch):
    monkeypatch.setattr(judge, "TRIES", 2)
    with JudgeServer() as server:
        pass
    with pytest.raises(InputError, match=r"^judge http://127.+: no usable reply for q1 in 2 tries \(.*refused.*\)"):
        ask(new(server))


def test_it_gives_up_and_goes_on_later(new):
    with JudgeServer([429, NOT_JSON, "half", 500, NO_CHOICES, "hang up", 429, 500], every=1) as server:
        with pytest.raises(InputError) as error:
            ask(new(server))
        assert str(error.value) == (
            f'judge {server.url}/chat/completions: no usable reply for q1 in 8 tries (HTTP 500 {{"error": "not now"}}'
            "); verdicts so far are kept; run the same command to resume")  # fmt: skip
        assert len(server.requests) == 8 and len(new.said) == 7 and not any("\n" in line for line in new.said)
        assert ask(new(server)).content and len(server.requests) == 9  # the garbage on disk is no reply


@pytest.mark.parametrize("after, waits", [
    (None, [1, 2, 4, 8, 16, 32, 60]), ("0", [1, 2, 4, 8, 16, 32, 60]), ("5", [5, 5, 5, 8, 16, 32, 60]),
    ("3600", [60] * 7), ("Fri, 31 Dec 2027 23:59:59 GMT", [1, 2, 4, 8, 16, 32, 60]), ("-1", [1, 2, 4, 8, 16, 32, 60])])
def test_how_long_it_waits(new, monkeypatch, after, waits):
    slept = []
    monkeypatch.setattr(judge, "WAIT", 1.0)
    monkeypatch.setattr(judge.time, "sleep", slept.append)
    with JudgeServer([429] * 8, every=1, headers={"Retry-After": after} if after else {}) as server:
        with pytest.raises(InputError):
            ask(new(server))
    assert slept == waits and new.said[0].endswith(f"try 2 of 8 in {waits[0]} s")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_ends_it_at_once(new, status):
    with JudgeServer([status], every=1) as server:
        with pytest.raises(InputError) as error:
            ask(new(server))
        assert str(error.value) == f'judge {server.url}/chat/completions: HTTP {status} {{"error": "not now"}}'
        assert len(server.requests) == 1 and new.said == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_take_the_key_elsewhere(new, status):
    with JudgeServer() as other, JudgeServer([status], every=1, headers={"Location": other.url}) as server:
        with pytest.raises(InputError, match=f"HTTP {status}"):
            ask(new(server))
        assert len(server.requests) == 1 and other.requests == []


# ---- the store


def test_replies_are_stored_as_they_came_before_they_are_read(new, monkeypatch):
    seen = []
    monkeypatch.setattr(judge, "read_reply", lambda body: seen.append(stored(new.path)) or read_reply(body))
    with JudgeServer([NOT_JSON], every=1, verdict=lambda body: "8 9") as server:
        ask(new(server))
    lines = stored(new.path)
    assert seen == [lines[:1], lines]
    assert [(line["where"], line["body"]) for line in lines] == [("q1", NOT_JSON), ("q1", completion("8 9"))]
    assert {tuple(line) for line in lines} == {("where", "request", "body")}


def test_what_is_stored_is_not_asked_again(new):
    with JudgeServer() as server:
        asking = new(server)
        first = [ask(asking, f"q{i}", temperature=i) for i in range(3)]
        assert ask(asking, "q0", temperature=0) == first[0] and len(server.requests) == 3
    again, before = new(server), new.path.read_bytes()  # the server is gone
    assert [ask(again, f"q{i}", temperature=i) for i in range(3)] == first
    assert again.served == {MODEL} and new.path.read_bytes() == before


@pytest.mark.parametrize("left", ["nothing", "half", "all but the newline"])
def test_a_line_that_a_kill_cut_off_is_asked_again(new, left):
    with JudgeServer() as server:
        asking = new(server)
        replies = [ask(asking, f"q{i}", temperature=i) for i in range(3)]
        whole = new.path.read_bytes()
        last = whole.splitlines(keepends=True)[-1]
        new.path.write_bytes(whole[: -len(last)] + {"nothing": b"", "half": last[:40]}.get(left, last[:-1]))
        again = new(server)
        assert [ask(again, f"q{i}", temperature=i) for i in range(3)] == replies
    assert len(server.requests) == 4 and new.path.read_bytes() == whole


@pytest.mark.parametrize("line", [
    "{}", "[]", "5", "null", "no JSON", "", "\xff", '{"where": "q", "request": "r"}', "[" * 100_000,
    '{"question_id": 1, "prompt": "p", "text": "t"}', '{"where": [], "request": "r", "body": "' + (
        r'{\"choices\": [{\"message\": {}}]}"}')])  # fmt: skip
def test_a_line_that_is_not_ours(new, line):
    with JudgeServer() as server:
        ask(new(server))
        before = new.path.read_bytes() + line.encode("latin-1") + b"\n"
        new.path.write_bytes(before)
        with pytest.raises(InputError, match="a.judge.jsonl, line 2: not a line written by this command"):
            new(server)
    assert new.path.read_bytes() == before


def test_a_changed_request_is_asked_again(new):
    with JudgeServer() as server:
        ask(new(server))
        ask(new(server), where="q2")
        ask(new(server), messages=[{"role": "user", "content": "How bad is this?"}])
        ask(new(server), temperature=0.5)
        ask(new(server), max_tokens=3)
        ask(new(server, model="gpt-4"))
        ask(new(server.url + "beta"))  # another endpoint may have another model by that name
        assert len(server.requests) == len({line["where"] + line["request"] for line in stored(new.path)}) == 7
        ask(new(server))  # the first one is still there
        assert len(server.requests) == 7


# ---- the key


@pytest.mark.parametrize("fault", [None, f"<p>{KEY}</p>", f'{{"choices": "{KEY}"}}'])
def test_the_key_is_nowhere_even_if_the_server_says_it(new, fault):
    with JudgeServer([fault] if fault else [], every=1, verdict=lambda body: f"8 9, {KEY}") as server:
        assert ask(new(server)) == Reply("8 9, ***", MODEL)
    assert KEY not in new.path.read_text() + "".join(new.said) and "***" in new.path.read_text()
    assert all("***" in line for line in new.said) and len(new.said) == bool(fault)
    assert KEY in server.requests[0].headers["Authorization"]  # but there


@pytest.mark.parametrize("status", [401, 500])
def test_the_key_is_not_in_an_error(new, monkeypatch, status):
    monkeypatch.setattr(judge, "TRIES", 2)
    with JudgeServer([status] * 2, every=1, complaint=f"Invalid\n key: {KEY}!") as server:
        with pytest.raises(InputError, match=rf"HTTP {status} Invalid key: \*\*\*!"):
            ask(new(server))
    assert new.said == ["judge, q1: HTTP 500 Invalid key: ***!; try 2 of 2 in 0 s"] * (status == 500)
    assert not new.path.exists()


def test_a_short_key_is_no_secret(new):
    """Local servers take any: "x" struck out of every text would leave little of it."""
    with JudgeServer(verdict=lambda body: "8 9 EMPTY") as server:
        assert ask(new(server, key="EMPTY")).content == "8 9 EMPTY"


@pytest.mark.parametrize("key", ["", " ", "sk a", "sk\n", "sk\r\nX-Header: 1", "schlüssel", "sk\x00", None])
def test_what_is_no_key(new, key):
    with pytest.raises(InputError, match=r"^the judge's key is empty or has invalid characters"):
        new("http://127.0.0.1/v1", key=key)


@pytest.mark.parametrize("url", [
    "", "api.openai.com/v1", "ftp://127.0.0.1/v1", "file:///etc/passwd", "//127.0.0.1", "http://", "https:///v1",
    "http://127.0.0.1:port/v1", "http://a b/v1", "http://[::1/v1", "http://127.0.0.1/v1\nHost: x", "http://é/v1"])
def test_what_is_no_url(new, url):
    """Said at once: not after the answers are made and two minutes of tries, nor in a traceback."""
    with pytest.raises(InputError) as error:
        new(url)
    assert str(error.value) == f"judge URL {url!r} is not of the form http(s)://host/path"


# ---- many at a time


def test_map_keeps_the_order_and_works_in_threads(new):
    together = threading.Barrier(judge.WORKERS, timeout=10)  # broken unless so many are there at once

    def work(item):
        together.wait()
        time.sleep(0.002 * (8 - item))  # the last is the first to be ready
        return item * item

    assert new("http://x").map(work, iter(range(8))) == [0, 1, 4, 9, 16, 25, 36, 49] and new.steps == [8] * 8
    assert new("http://x").map(work, []) == []


def test_asking_in_threads(new):
    with JudgeServer(fault for fault in FAULTS if fault != SILENCE) as server:
        asking = new(server)
        replies = asking.map(lambda i: ask(asking, f"q{i}", temperature=i / 100).content, range(40))
        assert len(new.said) == 6 and len(server.requests) == 46
    usable = [line["where"] for line in stored(new.path) if line["body"].startswith('{"model"')]
    assert sorted(usable) == sorted(f"q{i}" for i in range(40)) and set(replies) == set("ABCZ")
    again = new(server)  # the server is gone
    assert again.map(lambda i: ask(again, f"q{i}", temperature=i / 100).content, range(40)) == replies


def test_the_first_error_ends_it(new):
    begun = []

    def work(item):
        begun.append(item)
        if item == 5:
            raise InputError("about item 5")
        time.sleep(0.01)

    with pytest.raises(InputError, match="^about item 5$"):
        new("http://x").map(work, range(1000))
    time.sleep(0.05)
    assert 6 <= len(begun) < 20


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_error_of_any_kind_ends_it(new, error):
    with pytest.raises(error):
        new("http://x").map(lambda item: (_ for _ in ()).throw(error), range(9))


def test_ctrl_c_does_not_wait_for_the_judge(new):
    """Against an endpoint that never answers: Ctrl-C ends `map`, and no thread keeps the process from ending."""
    with JudgeServer([SILENCE] * 9, every=1) as server:
        asking, before = new(server, timeout=60), set(threading.enumerate())

        def interrupt():
            while len(server.requests) < judge.WORKERS:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt, daemon=True).start()
            asking.map(lambda i: ask(asking, f"q{i}"), range(9))
        stuck = set(threading.enumerate()) - before
        assert len(stuck) >= judge.WORKERS and all(thread.daemon for thread in stuck)
        server.faults.clear()  # they end before the next test
        server.closing.set()
        for thread in stuck:
            thread.join(10)


# ---- slow and endless replies


def raw_server(write):
    """A server that answers one request with headers and whatever write(connection) sends."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with listening, contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
                    write(connection)

    threading.Thread(target=serve, daemon=True).start()
    return listening, f"http://127.0.0.1:{listening.getsockname()[1]}"


def drip(connection):
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.1)


def endless(connection):
    while True:
        connection.sendall(b" " * (1 << 20))


@pytest.mark.parametrize("write, reason", [(drip, "timed out"), (endless, "more than 10 MB")])
def test_a_reply_has_an_end(tmp_path, monkeypatch, write, reason):
    monkeypatch.setattr(judge, "TRIES", 1)
    listening, url = raw_server(write)
    slow = Judge(url, KEY, MODEL, tmp_path / "j.jsonl", texts={}, runs=1, timeout=1, progress=None, warn=print)
    begin = time.monotonic()
    with pytest.raises(InputError, match=rf"no usable reply for q1 in 1 tries \({reason}\)"):
        slow.ask("q1", ASKED, temperature=0, max_tokens=3)
    listening.close()
    assert time.monotonic() - begin < 10
