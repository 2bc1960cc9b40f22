"""The hub out of reach: one sentence within seconds, the caches where they hold what is asked for, and no limit to a download."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants

from llmkd import hub
from llmkd.data.rows import load_rows
from llmkd.errors import InputError

CODE = """
import json, sys, time
import lm_eval.api.metrics
from llmkd import hub
from llmkd.data.rows import load_rows
from llmkd.evaluation.lm_eval_tasks import _hub_fault, _metric_fault
from llmkd.models.folders import resolve

def model():
    return str(resolve("no-one/model", "teacher.path"))

def cached():
    return str(resolve("some-one/model", "teacher.path"))

def rows():
    load_rows("no-one/rows", name=None, split="train", rows=3)

def task():
    return _hub_fault({"dataset_path": "no-one/task"})

def metric():
    return _metric_fault({"metric_list": [{"metric": "no_such_metric"}]})

for work in (model, cached, rows, task, metric):
    hub._Last.time = -float("inf")  # each asks for itself
    started = time.perf_counter()
    try:
        sentence = work()
    except Exception as error:
        sentence = str(error)
    print(json.dumps([work.__name__, sentence, time.perf_counter() - started]))
    hub.ANSWER_SECONDS = 1  # the first has waited as long as users do
"""


def test_nobody_waits_long_for_a_hub_out_of_reach(tiny: Path, tmp_path: Path) -> None:
    """Its packets are dropped: a proxy that takes connections and never answers."""
    cache = tmp_path / "hub" / "models--some-one--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / "abc").symlink_to(tiny / "teacher")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        environment |= dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), proxy)
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=280, check=True
        )
    answers = {name: (sentence, seconds) for name, sentence, seconds in map(json.loads, done.stdout.splitlines())}
    assert list(answers) == ["model", "cached", "rows", "task", "metric"]
    for name, (_, seconds) in answers.items():
        assert seconds < hub.ANSWER_SECONDS + 15, (name, seconds)  # of which a busy machine may need much
    assert answers["cached"][0] == str(cache / "snapshots" / "abc")
    for name, waited, start in (
        ("model", 5, "teacher.path: no folder 'no-one/model' here, and "),
        ("rows", 1, "data.source: 'no-one/rows' is not a file here, and "),
        ("task", 1, "reads the data set no-one/task, and "),
    ):
        sentence = answers[name][0]
        why = rf"(no answer in {waited} s|.*timed out)"  # whichever of the two clocks comes first
        said = rf"{re.escape(start)}https://huggingface.co can't be reached \({why}\), nor is it in the cache"
        assert re.match(said, sentence), sentence
        assert all(
            cure in sentence for cure in ("a local path", "HF_HUB_OFFLINE=1", "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT")
        )
        assert "\n" not in sentence
    assert "'no_such_metric', which is not lm-eval's own" in answers["metric"][0]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without HF_HUB_OFFLINE, with nothing asked yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub._Last, "problem", None)
    monkeypatch.setattr(hub._Last, "time", -float("inf"))


@pytest.fixture
def answering(online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that answers everything with 404; the requests that it got."""
    requests: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield requests
        server.shutdown()


def test_a_download_may_take_as_long_as_it_does(answering: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 2)

    def slow() -> bool:
        time.sleep(2.5)
        return constants.HF_HUB_OFFLINE

    assert hub.fetch(slow) is False and hub.last_problem() is None
    assert hub.fetch(lambda: 3) == 3 and len(answering) == 1  # one question for both


def test_a_failure_of_a_hub_that_answers_stays_what_it_is(answering: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="such a model"):
        hub.fetch(lambda: Path("such a model").read_text())


@pytest.mark.usefixtures("online")
def test_out_of_reach_its_clients_read_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert hub.fetch(lambda: constants.HF_HUB_OFFLINE) is True  # what the cache gave
    assert constants.HF_HUB_OFFLINE is False and "refused" in (hub.last_problem() or "")
    with pytest.raises(
        hub.OutOfReach, match=r"can't be reached \(.*refused.*\), nor is it in the cache \(no such split\); give"
    ):
        hub.fetch(lambda: (_ for _ in ()).throw(ValueError("no such split")))


@pytest.mark.usefixtures("online")
def test_a_rank_takes_the_first_ones_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has asked; another, which reads after it, does not wait again."""
    hub.believe("no answer in 5 s")
    monkeypatch.setattr(hub, "_ask", lambda: pytest.fail("asked again"))
    with pytest.raises(InputError, match=r"'no-one/rows' is not a file here, and .* \(no answer in 5 s\)"):
        load_rows("no-one/rows", name=None, split="train", rows=None)
