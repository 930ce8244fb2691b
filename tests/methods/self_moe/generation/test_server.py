"""The back end behind a URL: a real `transformers serve`, and servers that fail in the ways servers do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml

from moe_dist.errors import EXIT_OK, UserError
from moe_dist.launch.environment import free_port
from moe_dist.methods.self_moe.generation.backend import Sampling
from moe_dist.methods.self_moe.generation.config import load_config
from moe_dist.methods.self_moe.generation.config_server import ServerSection
from moe_dist.methods.self_moe.generation.generate import generate
from moe_dist.methods.self_moe.generation.local_model import LocalModel
from moe_dist.methods.self_moe.generation.server import KEY, Server

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=6)
SECRET = "sk-do-not-show-this"


class Scripted:
    """A server that gives the listed answers, (status, headers, body) each, the last one again and again."""

    def __init__(self, *answers):
        self.answers, self.requests, self.most, self._busy = list(answers), [], 0, 0
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                    outer._busy += 1
                    outer.most = max(outer.most, outer._busy)
                status, headers, given = answer(body) if callable(answer) else answer
                with lock:
                    outer._busy -= 1
                data = given if isinstance(given, bytes) else json.dumps(given).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def client(self, **fields) -> tuple[Server, list[float]]:
        pauses = []
        url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return Server(ServerSection(url=url, model="m", **fields), sleep=pauses.append), pauses


def text(said: str, reason: str = "stop", tokens: int = 3):
    return 200, {}, {"choices": [{"text": said, "finish_reason": reason}], "usage": {"completion_tokens": tokens}}


def test_request_and_answer():
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=5, stop=("\n\n",))
    heard = []
    with Scripted(text("one\n\ntwo", "length")) as server:
        client, _ = server.client()
        (done,) = client.complete(["say"], sampling, seed=2**31 + 4, on_tokens=heard.append)
        (path, headers, body) = server.requests[0]
    assert (done.text, done.finished, done.tokens, heard) == ("one", True, 3, [3])
    assert path == "/v1/completions"
    assert "Authorization" not in headers
    sent = {
        "model": "m",
        "prompt": "say",
        "max_tokens": 5,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["\n\n"],
        "seed": 4,
    }
    assert body == sent
    assert client.identity["reproducible"] is False


def test_many_at_a_time_in_order():
    def slow(body):
        time.sleep(0.05)
        return text(body["prompt"].upper(), "length")

    prompts = [f"p{number}" for number in range(12)]
    with Scripted(slow) as server:
        client, _ = server.client(concurrency=4)
        done = client.complete(prompts, GREEDY, seed=0)
        assert 1 < server.most <= 4
    assert [completion.text for completion in done] == [prompt.upper() for prompt in prompts]
    assert not any(completion.finished for completion in done)


def test_passing_failures_are_tried_again():
    busy = (429, {"Retry-After": "7"}, {"error": {"message": "slow down"}})
    with Scripted(busy, (503, {}, b""), text("fine")) as server:
        client, pauses = server.client()
        assert client.complete(["x"], GREEDY, seed=0)[0].text == "fine"
        assert len(server.requests) == 3
    assert pauses[0] == 7.0
    assert 1.0 <= pauses[1] <= 2.0


def test_lasting_failures_end_with_what_to_do():
    with Scripted((500, {}, {"detail": "out of memory"})) as server:
        client, pauses = server.client(retries=2)
        with pytest.raises(UserError, match=r"no answer after 3 tries \(500 Internal Server Error: out of memory\)"):
            client.complete(["x"], GREEDY, seed=0)
        assert len(pauses) == 2
    pauses.clear()
    with pytest.raises(UserError, match=r"no answer after 3 tries \(ConnectionRefusedError"):
        client.complete(["x"], GREEDY, seed=0)


def test_no_answer_in_time():
    release = threading.Event()
    with Scripted(lambda body: release.wait(10) and text("late")) as server:
        client, _ = server.client(retries=0, timeout=0.2)
        with pytest.raises(UserError, match="TimeoutError"):
            client.complete(["x"], GREEDY, seed=0)
        release.set()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, {"error": {"message": f"bad key {SECRET}"}}), rf"set {KEY} in the environment"),
        ((404, {}, b"<html>"), "check server.url and server.model"),
        ((400, {}, {"error": {"message": "prompt too long"}}), "does not take the request .*prompt too long"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "sends requests elsewhere"),
        ((200, {}, b"<html>"), "is no JSON"),
        ((200, {}, {"choices": []}), r"no choices\[0\].text"),
        ((200, {}, [1]), r"no choices\[0\].text"),
    ],
)
def test_failures_that_stay_are_not_tried_again_and_show_no_key(monkeypatch, answer, message):
    monkeypatch.setenv(KEY, SECRET)
    with Scripted(answer) as server:
        client, pauses = server.client()
        with pytest.raises(UserError, match=message) as error:
            client.complete(["x"], GREEDY, seed=0)
        assert server.requests[0][1]["Authorization"] == f"Bearer {SECRET}"
        assert len(server.requests) == 1
    assert not pauses
    assert SECRET not in str(error.value) + json.dumps(client.identity)


def test_after_a_failure_no_more_is_asked():
    with Scripted((400, {}, {"error": "no"})) as server:
        client, _ = server.client(concurrency=1)
        with pytest.raises(UserError):
            client.complete(["x"] * 50, GREEDY, seed=0)
        assert len(server.requests) < 5


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host:80", f"http://me:{SECRET}@host/v1", f"http://host/v1?key={SECRET}"]
)
def test_bad_urls(url):
    with pytest.raises(UserError, match=r"server\.url") as error:
        Server(ServerSection(url=url, model="m"))
    assert SECRET not in str(error.value)
    with pytest.raises(UserError, match=r"server\.model is not set"):
        Server(ServerSection(url="http://127.0.0.1"))


@pytest.fixture(scope="module")
def serve(base, tmp_path_factory):
    """(a model folder, the base URL of a real server)."""
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}: pip install 'moe_dist[serve]'")
    port = free_port()
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    words = [program, "serve", str(base), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = open(tmp_path_factory.mktemp("serve") / "log", "w+")  # noqa: SIM115 - lives as long as the server
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                log.seek(0)
                assert process.poll() is None, log.read()
                assert time.monotonic() < deadline, log.read()
                time.sleep(0.3)
        yield base, f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def test_a_real_server_gives_what_the_model_gives(serve):
    folder, url = serve
    prompts = ["Tasks 8", "Answers", "Answers\n\nQ do echo abc"]
    served = Server(ServerSection(url=url, model=str(folder), concurrency=2)).complete(prompts, GREEDY, seed=0)
    local = LocalModel(folder, device=torch.device("cpu")).complete(prompts, GREEDY, seed=0)
    assert [done.text for done in served] == [done.text for done in local]
    assert [done.finished for done in served] == [done.finished for done in local]
    assert all(done.tokens == 6 for done in served if not done.finished)
    assert any(done.text for done in served)


def test_a_real_server_that_does_not_know_the_model(serve):
    with pytest.raises(UserError, match=r"server\.model|does not take the request|no answer after 1 tries"):
        Server(ServerSection(url=serve[1], model="other", retries=0)).complete(["x"], GREEDY, seed=0)


def test_generation_through_a_real_server(serve, generation, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    config = generation(model=None, backend="server", count=3, max_prompts=24)
    settings = yaml.safe_load(config.read_text())
    settings["server"] = {"url": serve[1], "model": str(serve[0]), "concurrency": 2}
    config.write_text(yaml.safe_dump(settings))
    assert generate(load_config(config), tmp_path / "out", device=torch.device("cpu"), say=None) == EXIT_OK
    for skill in ("echo", "twice"):
        records = [json.loads(line) for line in (tmp_path / "out" / f"{skill}.jsonl").read_text().splitlines()]
        assert 1 <= len(records) <= 3
        for record in records:
            assert record["messages"][0]["content"].startswith(f"do {skill} ")
            assert record["provenance"]["base"]["reproducible"] is False
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in data for data in written)
