"""A judge model behind an OpenAI-compatible chat endpoint: asked by urllib, every raw reply kept on disk.

What is asked and how a reply is read is in the benchmarks' files; here is only the way there and back. The endpoint's
key is used for the request's header and nowhere else: it is struck out of every message and every stored reply
(one of less than eight characters, as local servers take, is no secret, and would be found in any text).
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
from pathlib import Path

from stic_min import InputError, first_line

TRIES = 8
WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try; it doubles from try to try
WORKERS = 4  # requests under way at the same time

# What the judge said, which model says it was, and whether it was cut off by the token limit
Reply = namedtuple("Reply", "content model cut", defaults=[False])


class JudgeError(InputError):
    """The endpoint's fault, not the answers file's."""


class Refused(Exception):
    """A try that failed in a way that a later one may not. `wait`: seconds the endpoint asks for, or None."""

    def __init__(self, reason, wait=None):
        super().__init__(reason)
        self.wait = wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *_):
        return None


def printable(text):
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def without_reasoning(content):
    """The verdict behind a reasoning model's thoughts; "" if it was cut off before it came to one.

    The official judges do not think aloud, so nothing changes for them. A server that does not split thoughts off puts
    them in front of the verdict, for some models without the opening tag, which is part of their template.
    """
    thoughts, tag, verdict = content.partition("</think>")
    if tag:
        return verdict.lstrip()
    return "" if thoughts.lstrip().startswith("<think>") else content


def read_reply(body):
    """The body of a chat completion -> Reply. Raises ValueError if it is none; no content (a filter's doing) is ""."""
    try:
        answer = json.loads(body)
        choice, model = answer["choices"][0], answer.get("model")
        message, cut = choice["message"], choice.get("finish_reason") == "length"
        content = message.get("content")
        if isinstance(content, list):  # in parts
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError("not a chat completion") from None
    if not isinstance(content, str | None):
        raise ValueError("a chat completion whose content is no text")
    whole = lambda text: text.encode("utf-8", "replace").decode()  # JSON can hold halves of surrogate pairs
    content = without_reasoning(whole(content or ""))
    if message.get("reasoning_content") or message.get("reasoning"):  # split off, but for the blank lines behind it
        content = content.lstrip()
    return Reply(content, whole(model) if isinstance(model, str) else "unnamed", cut)


class Judge:
    """One judge for one answers file.

    url: of the API, up to and without /chat/completions. path: where raw replies go, one JSON line each, before they
    are read; a reply that is there already is not asked for again. texts, runs: for the benchmark's `judge` function.
    progress: number of items -> object with `add()`. say: takes a line about a try that failed. max_tokens: in place of
    the benchmark's own limit; token_field: what the endpoint calls it. temperature: whether one is sent.
    Raises InputError: a URL or key that can't be one, a file that is not ours, and, when asked, a judge that refuses
    or gives no usable reply in TRIES tries; what it said until then is kept.
    """

    def __init__(self, url, key, model, path, *, texts, runs, timeout, progress, say, max_tokens=None,
                 token_field="max_tokens", temperature=True):  # fmt: skip
        try:
            parts = urllib.parse.urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isascii()
        except ValueError:
            usable = False
        if not usable or not url.isprintable() or " " in url:
            raise InputError(f"judge URL {url!r} is not of the form http(s)://host/path")
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError("the judge's key is empty or has characters that no key has (set OPENAI_API_KEY)")
        self.url, self.key, self.model, self.path = url.rstrip("/") + "/chat/completions", key, model, Path(path)
        self.texts, self.runs, self.timeout, self.progress, self.say = texts, runs, timeout, progress, say
        self.max_tokens, self.token_field, self.temperature = max_tokens, token_field, temperature
        self.opener = urllib.request.build_opener(NoRedirect)
        self.lock, self.served = threading.Lock(), set()
        self.stored = self.read()

    def read(self):
        """Usable replies on disk: {(where, request): Reply}; a last line that a kill cut off is taken away."""
        stored, lines = {}, self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                place, body = (entry["where"], entry["request"]), entry["body"]
                hash(place)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(f"{self.path}, line {number}: not a line that this command writes") from None
            try:
                reply = read_reply(body)
            except ValueError:
                continue  # a reply that was no use then; asked for again
            if reply.content:  # likewise one without content
                stored[place] = reply
        if self.path.is_file():
            with open(self.path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        return stored

    def clean(self, text):
        """Without the key."""
        forms = (self.key, self.key.replace("/", "\\/")) if len(self.key) >= 8 else ()  # the second: some JSON
        for form in forms:
            text = text.replace(form, "***")
        return text

    def ask(self, where, messages, *, temperature, max_tokens):
        """messages: [{"role", "content"}]; `where`, unique, names the request on disk and in messages -> Reply."""
        body = {"model": self.model, "messages": messages}
        body |= {"temperature": temperature} if self.temperature else {}
        body[self.token_field] = self.max_tokens or max_tokens
        data = json.dumps(body).encode()
        place = where, hashlib.sha256(self.url.encode() + data).hexdigest()[:16]
        reply = self.stored.get(place)
        for trial in range(1, TRIES + 1):
            if reply is not None:
                break
            try:
                reply = self.post(place, data)
            except Refused as refusal:
                if trial == TRIES:
                    raise JudgeError(
                        f"judge {self.url}: no usable reply about {where} in {TRIES} tries ({refusal}); "
                        "what it graded is kept, the same command goes on from there"
                    ) from None
                wait = min(max(WAIT * 2 ** (trial - 1), refusal.wait or 0), LONGEST_WAIT)
                self.say(f"judge, {where}: {refusal}; try {trial + 1} of {TRIES} in {wait:.0f} s")
                time.sleep(wait)
        self.served.add(reply.model)
        return reply

    def post(self, place, data):
        """One try. Raises Refused if another one may help, else InputError."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url, data, headers, method="POST")
        try:
            try:
                response = self.opener.open(request, timeout=self.timeout)
            except urllib.error.HTTPError as error:
                response = error  # a reply all the same
            with response:
                status, body = response.status, self.read_body(response).decode("utf-8", "replace")
                after = response.headers.get("Retry-After") or ""
        except (OSError, http.client.HTTPException, ValueError) as error:  # no connection, a timeout, half an answer
            raise Refused(self.clean(first_line(error))) from None
        body = self.clean(body)
        if status != 200:
            reason = f"HTTP {status} {printable(body)[:200]}".strip()
            if 300 <= status < 400:
                reason += f" (a redirect to {printable(response.headers.get('Location') or '?')}; see --judge-url)"
            if status != 429 and status < 500:
                raise JudgeError(f"judge {self.url}: {reason}")
            raise Refused(reason, float(after) if after.isdecimal() and after.isascii() else None)
        line = {"where": place[0], "request": place[1], "body": body}
        with self.lock, open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            reply = read_reply(body)
        except ValueError as error:
            raise Refused(f"{error}: {printable(body)[:80]!r}") from None
        return self.stored.setdefault(place, reply)

    def read_body(self, response):
        """The whole body, in `timeout` seconds however slowly it drips, and of 10 MB at most."""
        deadline, parts, size = time.monotonic() + self.timeout, [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > 10_000_000:
                raise OSError("more than 10 MB")
            if time.monotonic() > deadline:
                raise OSError("timed out")
        if response.length:  # of what Content-Length announced
            raise OSError(f"the connection ended {response.length} bytes too early")
        return b"".join(parts)

    def map(self, function, items):
        """[function(item) for item in items], WORKERS at a time; the first error ends it.

        Daemon threads: a process that is stopped does not wait for a judge that never answers.
        """
        items = list(items)
        done, results, stop = queue.SimpleQueue(), [None] * len(items), threading.Event()
        todo, lock = iter(enumerate(items)), threading.Lock()

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
            stop.set()  # the other workers end after what they are at
        return results
