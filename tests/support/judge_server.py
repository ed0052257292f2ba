"""A judge on this machine, over real HTTP: an OpenAI-compatible chat endpoint that fails now and then.

Its replies depend on the request alone and have the right form for each benchmark, so that a run that was stopped and
resumed gets the same verdicts. `faults` is a schedule: every `every`-th request gets the next fault, until none is
left (None: no fault). A list shorter than judge.TRIES never ends a run.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

os.environ["no_proxy"] = "127.0.0.1"  # no proxy is asked for this server

NOT_JSON, NO_CHOICES, SILENCE = "<html>502 Bad Gateway</html>", '{"error": "overloaded"}', "silence"
FAULTS = (429, 500, NOT_JSON, SILENCE, "half", NO_CHOICES, "hang up")  # silence costs the client's timeout
MODEL = "tiny-judge-1"


def verdict(body):
    """The judge's reply to a request: a text in the form that the benchmark asks for."""
    number = int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), 16)
    if body["messages"][0]["role"] == "system":  # LLaVA-Bench: two ratings and the reasons
        return f"{5 + number % 5} {1 + number // 5 % 9}\nThe first one is better."
    if body["max_tokens"] == 3:  # MM-Vet: a grade
        return f"{number % 11 / 10}"
    if body["max_tokens"] == 256:  # MathVista: what was extracted
        return ["3", "y", "1.2", "[2007, 2008]", "B"][number % 5]
    letter, asked = "ABCZ"[number % 4], body["messages"][0]["content"]  # MMBench: an option
    return "Z" if "There are several options" in asked and f"\n{letter}. " not in asked else letter


def completion(content, model=MODEL):
    return json.dumps({"model": model, "choices": [{"message": {"role": "assistant", "content": content}}]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.requests.append(SimpleNamespace(path=self.path, headers=dict(self.headers), body=body))
            due = judge.faults and len(judge.requests) % judge.every == 0
            fault = judge.faults.pop(0) if due else None
        if fault == SILENCE:
            judge.closing.wait(60)
        elif fault == "half":
            self.answer(200, completion(judge.verdict(body))[:40], length=1000)
        elif isinstance(fault, int):
            self.answer(fault, judge.complaint)
        elif fault == "hang up":
            self.close_connection = True
        else:
            self.answer(200, fault or completion(judge.verdict(body)))

    do_GET = do_POST  # what a redirect would turn into

    def answer(self, status, text, length=None):
        data, judge = text.encode(), self.server.judge
        self.send_response(status)
        for name, value in judge.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, *_):
        pass


class JudgeServer:
    """with JudgeServer(faults) as server: `server.url` is for --judge-url, `server.requests` lists what it was sent.

    verdict: body -> content, replaces the function above. complaint: body of a faulty status. headers: of every reply.
    """

    def __init__(self, faults=(), every=2, verdict=verdict, complaint='{"error": "not now"}', headers=None):
        self.verdict, self.complaint = verdict, complaint
        self.headers = {"Retry-After": "0"} if headers is None else headers
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.plan(*faults, every=every)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.judge = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def plan(self, *faults, every=2):
        """Sets the faults from now on, and counts requests from 0 again."""
        self.faults, self.every, self.requests = list(faults), every, []

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
