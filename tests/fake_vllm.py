"""A stand-in for ``vllm serve``: answers at once as a model would whose output is a function of the prompt.

    python fake_vllm.py MODEL --host=127.0.0.1 --port=N [--fake BEHAVIOUR ...]

Takes any further flag. Behaviours: ``step=MS`` between pieces of a stream, ``per-step=N`` tokens in a piece, ``wrong``
tokens, ``fail`` at start, ``die=N`` at the Nth request, ``hang=N`` from the Nth request on, ``refuse`` every request,
``no-ids`` (a request that asks for them gets none), ``refuse-ids``, ``child`` (a process of its own that stays), and
``stubborn`` (SIGTERM does nothing). ``--tag=TEXT`` is on the command line of every process of it.

Answers that are not streamed come from another model, whose distributions after every prefix are known by hand
(:func:`distribution`): ``approximate=N`` is wrong after each prefix whose length N divides. ``no-prompt-logprobs``
refuses them, ``no-logprobs`` tells none, ``context=N`` is its longest prompt and output.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COUNTS = {"drafts": 0, "accepted": 0, "tokens": 0}
LOCK = threading.Lock()
MODEL = "fake"


class Behaviour:
    """What ``--fake`` asked for."""

    def __init__(self, words: list[str]) -> None:
        self.words = {word.partition("=")[0]: word.partition("=")[2] for word in words}
        self.requests = 0

    def __contains__(self, name: str) -> bool:
        return name in self.words

    def number(self, name: str, default: int) -> int:
        return int(self.words.get(name) or default)


def output(prompt: Any, count: int, wrong: bool) -> list[int]:
    """``count`` token ids that follow from the prompt."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    return [digest[i % 32] + (1 if wrong and i > 3 else 0) for i in range(count)]


def distribution(prefix: Sequence[int], every: int = 0) -> dict[int, float]:
    """Probabilities of the three likeliest tokens after ``prefix``; the rest is spread over many. The exact model has
    0.7, 0.2 and 0.05; the approximate one, where it is wrong, 0.3, 0.6 and 0.05 for the same tokens."""
    first = (7 * prefix[-1] + len(prefix)) % 199
    wrong = every and len(prefix) % every == 0
    return {first: 0.3 if wrong else 0.7, first + 200: 0.6 if wrong else 0.2, first + 400: 0.05}


def generate(prompt: Sequence[int], count: int, every: int = 0) -> list[int]:
    """The greedy output."""
    tokens = list(prompt)
    for _ in range(count):
        chances = distribution(tokens, every)
        tokens.append(max(chances, key=lambda token: chances[token]))
    return tokens[len(prompt) :]


def ids(text: str) -> list[int]:
    """Token ids of a prompt that is text."""
    return [len(word) for word in text.split()]


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: str, kind: str = "application/json") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            card: dict[str, Any] = {"id": MODEL}
            if "context" in self.behaviour:
                card["max_model_len"] = self.behaviour.number("context", 0)
            self._send(200, json.dumps({"data": [card]}))
        elif self.path == "/metrics":
            lines = []
            for name, key in (("num_drafts", "drafts"), ("num_accepted_tokens", "accepted")):
                lines += [f"# TYPE vllm:spec_decode_{name}_total counter"]
                lines += [f'vllm:spec_decode_{name}_total{{engine="0",model_name="fake"}} {COUNTS[key]}']
            lines += ["# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter"]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {COUNTS["accepted"]}'
            ]
            lines += ["# TYPE vllm:num_requests_running gauge", "vllm:num_requests_running 3"]
            self._send(200, "\n".join(lines) + "\n", "text/plain")
        else:
            self._send(200, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with LOCK:
            self.behaviour.requests += 1
            number = self.behaviour.requests
        if "die" in self.behaviour and number >= self.behaviour.number("die", 1):
            print("RuntimeError: the fake model is tired", flush=True)
            os._exit(3)
        if "hang" in self.behaviour and number >= self.behaviour.number("hang", 1):
            time.sleep(3600)
        if "refuse" in self.behaviour or ("refuse-ids" in self.behaviour and "return_token_ids" in body):
            self._send(400, json.dumps({"error": {"message": "this request\nis not to my taste"}}))
            return
        if "prompt_logprobs" in body and "no-prompt-logprobs" in self.behaviour:
            self._send(400, json.dumps({"error": {"message": "prompt_logprobs: not here"}}))
        elif body.get("stream"):
            self._stream(body)
        else:
            self._send(200, json.dumps(self._whole(body)))

    def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        every = self.behaviour.number("approximate", 0)
        if "messages" in body:
            return {"prompt_token_ids": ids(body["messages"][0]["content"][0]["text"]), "choices": [{}]}
        prompt = ids(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
        tokens = generate(prompt, body["max_tokens"], every)
        choice: dict[str, Any] = {"token_ids": tokens, "prompt_token_ids": prompt}
        if "logprobs" in body and "no-logprobs" not in self.behaviour:
            told = [distribution([*prompt, *tokens[:i]], every) for i in range(len(tokens))]
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{t}": math.log(p) for t, p in d.items()} for d in told]}
        if "prompt_logprobs" in body:  # prompts are computed in full
            told = [distribution(prompt[:i]) for i in range(1, len(prompt))]
            for chances, token in zip(told, prompt[1:], strict=True):
                chances.setdefault(token, 1e-4)
            choice["prompt_logprobs"] = [None, *({t: {"logprob": math.log(p)} for t, p in d.items()} for d in told)]
        with LOCK:  # two tokens a step, after the first
            COUNTS["accepted"] += (len(tokens) - 1) // 2
        return {"choices": [choice]}

    def _stream(self, body: dict[str, Any]) -> None:
        chat = "messages" in body
        prompt = body["messages"] if chat else body["prompt"]
        tokens = output(prompt, body.get("max_completion_tokens") or body["max_tokens"], "wrong" in self.behaviour)
        told = body.get("return_token_ids") and "no-ids" not in self.behaviour
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if chat:
            self._piece({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        size = self.behaviour.number("per-step", 1)
        for begin in range(0, len(tokens), size):
            time.sleep(self.behaviour.number("step", 1) / 1000)
            part = tokens[begin : begin + size]
            text = "".join(f" w{token}" for token in part)
            choice: dict[str, Any] = {"delta": {"content": text}} if chat else {"text": text}
            if told:
                choice["token_ids"] = part
            self._piece({"choices": [choice]})
            with LOCK:
                COUNTS["drafts"] += 1
                COUNTS["accepted"] += len(part) - 1
        self._piece({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(tokens)}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _piece(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


def main() -> None:
    behaviour = Behaviour([w for flag, w in zip(sys.argv, sys.argv[1:], strict=False) if flag == "--fake"])
    flags = dict(word.split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
    if "fail" in behaviour:
        print("(EngineCore pid=7) ERROR 11-21 13:00:00 [core.py:99] ValueError: no such model here", flush=True)
        print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
        sys.exit(1)
    if "stubborn" in behaviour:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in behaviour:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", flags.get("--tag", "")])
    Handler.behaviour = behaviour
    with FakeServer((flags["--host"], int(flags["--port"])), Handler) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
