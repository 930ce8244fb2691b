"""Generation by an OpenAI-compatible server (vLLM, transformers serve, ...), through its /completions endpoint.

A key, if the server wants one, is taken from the environment variable MOE_DIST_SERVER_KEY alone and appears in no
message and no file. Servers batch requests as they come and few heed a seed to the bit, so the same command may give
other records: their provenance says `reproducible: false`.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from moe_dist.errors import UserError
from moe_dist.methods.self_moe.generation.backend import Completion, Sampling
from moe_dist.methods.self_moe.generation.config_server import ServerSection

KEY = "MOE_DIST_SERVER_KEY"
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # what a further try may find mended
LONGEST_PAUSE = 60.0  # seconds
LARGEST = 64 << 20  # bytes of an answer
SHOWN = 300  # characters of a server's own words


class Server:
    """A `Backend` behind a URL. sleep: how to wait between tries."""

    context = None

    def __init__(self, section: ServerSection, *, sleep: Callable[[float], None] = time.sleep):
        section.validate("server")
        self.section, self._sleep = section, sleep
        self.url = section.url.rstrip("/")
        self._key = os.environ.get(KEY, "").strip()
        self._open = urllib.request.build_opener(_NoRedirect).open
        self.identity = {"backend": "server", "url": self.url, "model": section.model, "reproducible": False}

    def count(self, texts: Sequence[str]) -> None:
        """Only the server knows its tokenizer."""
        return None

    def complete(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        seed: int,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> list[Completion]:
        """A completion of each prompt, in order, `concurrency` at a time. Raises UserError where the server fails.

        After the first failure no further request is sent.
        """
        if not prompts:
            return []

        def ask(numbered: tuple[int, str]) -> Completion:
            number, prompt = numbered
            done = self._complete(prompt, sampling, seed=(seed + number) % 2**31)
            on_tokens(done.tokens)
            return done

        pool = ThreadPoolExecutor(max_workers=min(self.section.concurrency, len(prompts)))
        try:
            return list(pool.map(ask, enumerate(prompts)))
        finally:
            pool.shutdown(cancel_futures=True)

    def _complete(self, prompt: str, sampling: Sampling, *, seed: int) -> Completion:
        body = {
            "model": self.section.model,
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
        }
        if sampling.temperature > 0:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        answer = self._post("/completions", body)
        try:
            (choice,) = answer["choices"]
            text, finished = choice["text"], choice.get("finish_reason") != "length"
            tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
            places = [place for place in map(text.find, sampling.stop) if place >= 0]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{self.url}/completions: the answer holds no choices[0].text; is this an OpenAI-compatible server?"
            ) from None
        return Completion(text[: min(places)], True, tokens) if places else Completion(text, finished, tokens)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers, method="POST")
        for tries_left in range(self.section.retries, -1, -1):
            wait, why = None, ""
            try:
                with self._open(request, timeout=self.section.timeout) as response:
                    return _json_of(response.read(LARGEST), self.url + path)
            except urllib.error.HTTPError as error:
                why = self._words_of(error)
                if error.code not in PASSING:
                    raise UserError(self._advice(error.code, why)) from None
                wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:  # no server, a broken connection, no answer in time
                reason = getattr(error, "reason", error)
                why = self._redacted(f"{type(reason).__name__}: {reason}")
            if tries_left:
                # Twice as long every time, and not all requests at once.
                pause = 2.0 ** (self.section.retries - tries_left) * random.uniform(0.5, 1.0)
                self._sleep(min(max(pause, wait or 0.0), LONGEST_PAUSE))
        raise UserError(
            f"{self.url}: no answer after {self.section.retries + 1} tries ({why}). Is the server running, and is "
            "server.url right? The same command goes on from here"
        )

    def _words_of(self, error: urllib.error.HTTPError) -> str:
        """What the server says about an error, in one line."""
        try:
            text = error.read(LARGEST).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            said = json.loads(text)
            said = said.get("error", said.get("detail", said.get("message", said)))
            text = said.get("message", said) if isinstance(said, dict) else said
        except (ValueError, AttributeError):
            pass
        return self._redacted(f"{error.code} {error.reason}: {' '.join(str(text).split())}"[:SHOWN])

    def _advice(self, code: int, why: str) -> str:
        if code in (401, 403):
            return f"{self.url} refuses the request ({why}): set {KEY} in the environment to a key that it takes"
        if code == 404:
            return f"{self.url}/completions is not there ({why}): check server.url and server.model"
        if 300 <= code < 400:
            return f"{self.url} sends requests elsewhere ({why}), where a key must not go: give that URL as server.url"
        return f"{self.url} does not take the request ({why})"

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever a server points."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _json_of(data: bytes, url: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{url}: the answer is no JSON; is this an OpenAI-compatible server?") from None


def _seconds(text: str | None) -> float | None:
    """Seconds of a Retry-After header; None where it has a date or nothing."""
    try:
        return max(0.0, float(text))
    except (TypeError, ValueError):
        return None
