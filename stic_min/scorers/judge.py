"""A judge model behind an OpenAI-compatible chat endpoint, queried with urllib; every raw reply is kept on
disk.

What is asked and how a reply is parsed is in the benchmarks' files; this file only handles transport. The
endpoint's key is used for the request header and nothing else: it is removed from every message and every
stored reply (except a key of less than eight characters, as used by local servers, which is not a secret and
could occur in any text).
"""

import hashlib
import http.client
import json
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

from stic_min import InputError, first_line
from stic_min.runtime.files import read_own_lines

TRIES = 8
WAIT = 1.0  # seconds before the second try; doubles with every try
LONGEST_WAIT = 60.0
WORKERS = 4  # concurrent requests

# The text of a reply, the model that it names, and whether it was cut off by the token limit
Reply = namedtuple("Reply", "content model cut", defaults=[False])


class JudgeError(InputError):
    """An error caused by the endpoint, not by the answers file."""


class Refused(Exception):
    """A failed try that may succeed later. `wait`: the seconds that the endpoint asks for, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another host."""

    def redirect_request(self, *_):
        return None


def flatten(text):
    """The text on one line, its unprintable characters as spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def without_reasoning(content):
    """The verdict after a reasoning model's thoughts; "" if it was cut off before the verdict.

    The official judges do not reason, so nothing changes for them. A server that does not separate the
    thoughts puts them before the verdict, for some models without the opening tag, which is part of their
    template.
    """
    thoughts, tag, verdict = content.partition("</think>")
    if tag:
        return verdict.lstrip()
    return "" if thoughts.lstrip().startswith("<think>") else content


def read_reply(body):
    """The body of a chat completion -> Reply. Missing content (from a filter) is "". Raises ValueError."""
    try:
        completion = json.loads(body)
        model = completion.get("model")
        choice = completion["choices"][0]
        message = choice["message"]
        cut = choice.get("finish_reason") == "length"
        content = message.get("content")
        if isinstance(content, list):  # in parts
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError("not a chat completion") from None
    if not isinstance(content, str | None):
        raise ValueError("a chat completion whose content is not text")
    clean = lambda text: text.encode("utf-8", "replace").decode()  # JSON can contain unpaired surrogates
    content = without_reasoning(clean(content or ""))
    if message.get("reasoning_content") or message.get("reasoning"):  # separate but for line breaks after it
        content = content.lstrip()
    return Reply(content, clean(model) if isinstance(model, str) else "unnamed", cut)


class Judge:
    """A judge for one answers file.

    url: the API's, up to but without /chat/completions. path: raw replies are stored here, one JSON line
    each, before they are parsed; stored replies are not requested again. texts, runs: for the benchmark's
    `judge` function.
    timeout: seconds per request. progress: number of items -> object with `add()`. warn: called with a line
    about each failed try. max_tokens: replaces the benchmark's own limit; token_field: the endpoint's name
    for it. temperature: whether to send one.
    Raises InputError: an invalid URL or key, a file that is not ours, and, when asked, a judge that refuses
    or gives no usable reply in TRIES tries; earlier replies are kept.
    """

    def __init__(
        self, url: str, key: str, model: str, path: str | Path, *, texts: dict, runs: int, timeout: float,
        progress: Callable, warn: Callable, max_tokens: int | None = None, token_field: str = "max_tokens",
        temperature: bool = True,
    ):  # fmt: skip
        try:
            parts = urllib.parse.urlsplit(url)
            is_http = parts.scheme in ("http", "https")
            usable = is_http and parts.hostname and parts.port != 0 and url.isascii()
        except ValueError:
            usable = False
        if not usable or not url.isprintable() or " " in url:
            raise InputError(f"judge URL {url!r} is not of the form http(s)://host/path")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError("the judge's key is empty or has invalid characters (set OPENAI_API_KEY)")
        self.url = url.rstrip("/") + "/chat/completions"
        self.key = key
        self.model = model
        self.path = Path(path)
        self.texts = texts
        self.runs = runs
        self.timeout = timeout
        self.progress = progress
        self.warn = warn
        self.max_tokens = max_tokens
        self.token_field = token_field
        self.temperature = temperature
        self.opener = urllib.request.build_opener(NoRedirect)
        self.lock = threading.Lock()
        self.served = set()  # the models that the replies name
        self.stored = self.read()

    def read(self):
        """The usable replies on disk as {(where, request): Reply}. Removes a last line cut off by a kill."""

        def parse(entry):
            place = entry["where"], entry["request"]
            hash(place)
            return place, entry["body"]

        stored = {}
        for place, body in read_own_lines(self.path, parse):
            try:
                reply = read_reply(body)
            except ValueError:
                continue  # an unusable reply is requested again
            if reply.content:  # and so is an empty one
                stored[place] = reply
        if self.path.is_file():
            with open(self.path, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        return stored

    def clean(self, text):
        """Removes the key from a text."""
        in_json = self.key.replace("/", "\\/")
        for form in (self.key, in_json) if len(self.key) >= 8 else ():
            text = text.replace(form, "***")
        return text

    def ask(self, where, messages, *, temperature, max_tokens):
        """messages: [{"role", "content"}] -> Reply. where: the request's unique name, on disk and in logs."""
        body = {"model": self.model, "messages": messages}
        if self.temperature:
            body["temperature"] = temperature
        body[self.token_field] = self.max_tokens or max_tokens
        data = json.dumps(body).encode()
        place = (where, hashlib.sha256(self.url.encode() + data).hexdigest()[:16])
        reply = self.stored.get(place)
        for trial in range(1, TRIES + 1):
            if reply is not None:
                break
            try:
                reply = self.post(place, data)
            except Refused as refusal:
                if trial == TRIES:
                    raise JudgeError(
                        f"judge {self.url}: no usable reply for {where} in {TRIES} tries ({refusal}); "
                        "verdicts so far are kept; run the same command to resume"
                    ) from None
                wait = min(max(WAIT * 2 ** (trial - 1), refusal.wait or 0), LONGEST_WAIT)
                self.warn(f"judge, {where}: {refusal}; try {trial + 1} of {TRIES} in {wait:.0f} s")
                time.sleep(wait)
        self.served.add(reply.model)
        return reply

    def post(self, place, data):
        """One try. Raises Refused if another try may help, else InputError."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url, data, headers, method="POST")
        try:
            try:
                response = self.opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                response = error  # also a reply
            with response:
                status = response.status
                body = self.read_body(response).decode("utf-8", "replace")
                after = response.headers.get("Retry-After") or ""
        except (OSError, http.client.HTTPException, ValueError) as error:
            # no connection, a timeout, half a reply
            raise Refused(self.clean(first_line(error))) from None
        body = self.clean(body)
        if status != 200:
            reason = f"HTTP {status} {flatten(body)[:200]}".strip()
            if 300 <= status < 400:
                target = flatten(response.headers.get("Location") or "?")
                reason += f" (a redirect to {target}; see --judge-url)"
            if status != 429 and status < 500:
                raise JudgeError(f"judge {self.url}: {reason}")
            raise Refused(reason, float(after) if after.isdecimal() and after.isascii() else None)
        line = {"where": place[0], "request": place[1], "body": body}
        with self.lock, open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            reply = read_reply(body)
        except ValueError as error:
            raise Refused(f"{error}: {flatten(body)[:80]!r}") from None
        return self.stored.setdefault(place, reply)

    def read_body(self, response):
        """The entire body, within `timeout` seconds however slowly it arrives, and at most 10 MB."""
        deadline = time.monotonic() + self.timeout
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > 10_000_000:
                raise OSError("more than 10 MB")
            if time.monotonic() > deadline:
                raise OSError("timed out")
        if response.length:  # bytes missing from Content-Length
            raise OSError(f"the connection ended {response.length} bytes too early")
        return b"".join(parts)

    def map(self, function, items):
        """[function(item) for item in items], WORKERS at a time; the first error stops it.

        The threads are daemons, so a stopped process does not wait for a judge that never answers.
        """
        items = list(items)
        results = [None] * len(items)
        done = queue.SimpleQueue()
        todo = iter(enumerate(items))
        lock = threading.Lock()
        stop = threading.Event()

        def work():
            while not stop.is_set():
                with lock:
                    i, item = next(todo, (None, None))
                if i is None:
                    return
                try:
                    done.put((i, function(item), None))
                except BaseException as error:
                    done.put((i, None, error))
                    return

        for _ in range(min(WORKERS, len(items))):
            threading.Thread(target=work, daemon=True).start()
        progress = self.progress(len(items))
        try:
            for _ in items:
                i, results[i], error = done.get()
                if error is not None:
                    raise error
                progress.add()
        finally:
            stop.set()  # the other workers end after their current item
        return results
