"""The driver of the scoring steps, with real processes of a step that has no models: devices, the queue, deaths, refusals, files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmkd.errors import InputError
from llmkd.evaluation import places, step
from llmkd.evaluation.places import BESIDE, SMALL, visible_devices
from llmkd.evaluation.results import ScoredModel
from llmkd.evaluation.step import Process, run, serve
from tests.unit.evaluation.pretend_step import STEP, Task

WORDS = {"a": "one two three", "b": "slow one", "c": "", "d": "slow one two", "e": "one two three four"}


def models(folder: Path, words: dict[str, str]) -> list[ScoredModel]:
    for name, text in words.items():
        (folder / name).write_text(text)
    return [ScoredModel(name=name, model=str(folder / name), fingerprint=text) for name, text in words.items()]


def scores(folder: Path, words: dict[str, str], **options: Any) -> dict[str, dict[str, Any]]:
    (folder / "processes").mkdir(exist_ok=True)
    files = run(STEP, models(folder, words), Task(2, folder / "processes"), folder / "out", **options)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def processes(folder: Path) -> list[str]:
    """What each process saw of the devices, and its variables."""
    return sorted(file.read_text() for file in (folder / "processes").iterdir())


def contents(folder: Path) -> dict[str, Any]:
    """All that was written, timings aside."""
    texts = {file.name: file.read_text() for file in (folder / "out").glob("*.jsonl")}
    results = {file.name: json.loads(file.read_text()) for file in (folder / "out").glob("*.json")}
    return {**texts, **{name: {**value, "seconds": 0, "model": ""} for name, value in results.items()}}


def test_two_devices_give_the_same_results_as_one(tmp_path: Path) -> None:
    """Each device has one process, which sees that device alone; both take models from one queue."""
    folders = []
    for devices in (["cpu"], ["5", "7"]):
        folders.append(tmp_path / str(len(devices)))
        folders[-1].mkdir()
        scored = scores(folders[-1], WORDS, devices=devices)
        assert {name: result["metrics"]["words"] for name, result in scored.items()} == {
            "a": 6, "b": 4, "c": 0, "d": 6, "e": 8
        }  # fmt: skip
    assert contents(folders[0]) == contents(folders[1]) and len(contents(folders[0])) == 10
    assert [text.split() for text in processes(folders[1])] == [["5"], ["7"]]
    assert len(processes(folders[0])) == 1
    assert [json.loads(line)["text"] for line in (folders[1] / "out" / "a.jsonl").read_text().splitlines()] == [
        "one", "two", "three"
    ]  # fmt: skip


SIZES = {"small": 50, "pair": 110, "four": 200, "huge": 5 * 60 + 1}


def weights_of(model: ScoredModel) -> int:
    return SIZES[model.name.rstrip("0123456789")]


def test_large_models_are_spread_over_groups_of_devices_and_small_ones_take_all_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On five cards of 100 bytes, of which weights take 60 at most; the same scores as where one card holds each."""
    names = ["small0", "pair1", "four2", "pair3", "huge4", "small5"]
    words = {name: "slow where" for name in names}
    monkeypatch.setattr(step, "card_bytes", lambda: 100)
    scored = scores(tmp_path, words, devices=list("01234"), weights=weights_of)
    too_large = scored.pop("huge4")
    assert "which need 6 GPUs" in too_large["error"] and "and 5 are here" in too_large["error"]
    seen = {
        name: json.loads((tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()[1])["text"] for name in scored
    }
    assert seen["four2"] == "0,1,2,3" and {seen["pair1"], seen["pair3"]} <= {"0,1", "2,3"}
    assert {seen["small0"], seen["small5"]} <= set("01234")
    assert {name: result["metrics"] for name, result in scored.items()} == dict.fromkeys(scored, {"words": 4})
    assert all(result["error"] is None for result in scored.values())


def test_devices_are_parted_without_waiting_for_each_other(tmp_path: Path) -> None:
    sizes = {"a": 4, "b": 2, "c": 1}
    unscored = [ScoredModel(name=name) for name in sizes]
    driver = step._Driver(
        STEP, unscored, sizes, Task(1, tmp_path), tmp_path, lambda _: Process(), 0, lambda count, note="": None
    )
    assert driver.parted("0123456", None) == [(["0", "1", "2", "3"], 4), (["4", "5"], 2), (["6"], 1)]
    assert driver.parted("0123", 4) == [(["0", "1"], 2), (["2", "3"], 2)]
    assert driver.parted("01", 2) == [(["0"], 1), (["1"], 1)] and driver.parted("0", 1) == []


@pytest.mark.parametrize(
    ("weights", "count", "card", "backend", "devices"),
    [
        (60, 4, 100, "hf", 1), (61, 4, 100, "hf", 2), (121, 4, 100, "hf", 3), (121, 4, 100, "vllm", 4),
        (10**9, 1, None, "vllm", 1), (240, 4, 100, "hf", 4),
    ],
)  # fmt: skip
def test_a_model_has_as_many_devices_as_its_weights_need(
    tmp_path: Path, weights: int, count: int, card: int | None, backend: str, devices: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12, "num_key_value_heads": 4}))
    model = ScoredModel(name="m", model=str(tmp_path), backend=backend)
    assert places.devices_for(model, weights, count, card) == devices


def test_a_model_that_fits_nowhere_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12, "num_key_value_heads": 3}))
    model = ScoredModel(name="m", model=str(tmp_path), backend="vllm")
    with pytest.raises(
        InputError, match=r"needs 4 GPUs, and vLLM can't share its 12 and 3 attention and key-value heads"
    ):
        places.devices_for(model, 200, 8, 100)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 12, "num_key_value_heads": 2}))
    assert places.devices_for(model, 200, 8, 100) == 4  # each key-value head is on two of them
    sentence = r"holds 60\.0 GiB of weights, which need 2 GPUs of 80\.0 GiB \(at most 0\.6 of each\), and 1 is here; use a machine"
    with pytest.raises(InputError, match=sentence):
        places.devices_for(ScoredModel(name="m", backend="hf"), 60 * 2**30, 1, 80 * 2**30)


def test_weights_are_counted_in_the_dtype_in_which_they_are_scored(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert places.weight_bytes([tmp_path], "bfloat16") == 2 * 22
    assert places.weight_bytes([tmp_path] * 2, "float32") == 8 * 22
    assert places.weight_bytes([tmp_path.parent], "float32") == 0  # no model


def test_a_process_that_dies_costs_its_own_model_alone(tmp_path: Path) -> None:
    words = {"first": "one", "killer": "die", "failing": "fail", "last": "one two"}
    scored = scores(tmp_path, words, devices=["0"])
    log_file = tmp_path / "out" / "pretend.log"
    assert scored["killer"]["error"] == f"the process that scored it ended with code 7; see {log_file}"
    assert scored["failing"]["error"] == "ValueError: it fails" and scored["failing"]["seconds"] > 0
    assert (scored["first"]["metrics"], scored["last"]["metrics"]) == ({"words": 2}, {"words": 4})
    assert (tmp_path / "out" / "killer.jsonl").read_text() == (tmp_path / "out" / "failing.jsonl").read_text() == ""
    assert "this is not for the parent" in log_file.read_text() and "ValueError" in log_file.read_text()
    assert processes(tmp_path) == ["0 ", "0 "]  # another one in the dead one's place


def test_what_is_up_to_date_is_not_done_again_and_what_failed_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = {"good": "one", "bad": "fail", "other": "one"}
    scores(tmp_path, words)
    times = {name: (tmp_path / "out" / f"{name}.json").stat().st_mtime_ns for name in words}
    with caplog.at_level(logging.INFO, logger="llmkd"):
        scored = scores(tmp_path, {**words, "other": "one two"})
    again = {name for name in words if (tmp_path / "out" / f"{name}.json").stat().st_mtime_ns != times[name]}
    assert again == {"bad", "other"} and scored["other"]["metrics"] == {"words": 4}
    assert "pretend: 1 of 3 models are up to date" in caplog.messages
    assert any(line.startswith("pretend: 2/2 other: words 4 (") for line in caplog.messages)


def test_the_bar_moves_by_models_and_by_what_their_processes_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model whose process has died is done with, too; shares are no lines of the log."""
    moved: list[float] = []

    def progress(work: str, *, total: float, unit: str, shown: bool) -> Any:
        assert (work, total, unit, shown) == ("pretend", 3, "models", True)
        return contextlib.nullcontext(moved.append)

    monkeypatch.setattr(step, "progress", progress)
    with caplog.at_level(logging.INFO, logger="llmkd"):
        scores(tmp_path, {"a": "one", "b": "halfway", "c": "halfway die"}, devices=["cpu"])
    assert moved == [1, 0.5, 0.5, 0.5, 0.5]
    assert not [line for line in caplog.messages if "progress" in line]


def test_models_that_want_another_process_get_it_and_the_others_share_theirs(tmp_path: Path) -> None:
    """As vLLM's: its variables, after all others, and a process that ends after one model."""

    def process(model: ScoredModel) -> Process:
        return Process(1, {"PRETEND_BACKEND": "vllm"}, alone=True) if model.name in "ac" else Process()

    scored = scores(tmp_path, dict.fromkeys("abcd", "one"), process=process, devices=["cpu"])
    assert all(result["error"] is None for result in scored.values())
    assert [text.endswith(" vllm") for text in processes(tmp_path)] == [False, True, True]


def test_orders_that_can_not_be_followed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^factor: must not be negative$"):
        run(STEP, models(tmp_path, WORDS), Task(-1, tmp_path), tmp_path / "out", devices=["0", "1"])
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_stop_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    class Recorded(step.child.Child):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self._process)

    def stop(line: str, *values: object) -> None:
        if "started" in str(values):
            raise KeyboardInterrupt

    monkeypatch.setattr(step.child, "Child", Recorded)
    monkeypatch.setattr(step.log, "info", stop)
    with pytest.raises(KeyboardInterrupt):
        scores(tmp_path, WORDS, devices=["0", "1"])
    assert len(started) == 2 and all(process.poll() == -9 for process in started)


def test_the_devices_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,6")
    assert visible_devices() == ["3", "6"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert visible_devices() == ["cpu"] and os.environ["CUDA_VISIBLE_DEVICES"] == "3,6"


def test_small_models_share_the_cores_of_a_machine_without_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").touch()
    unscored = [ScoredModel(name=folder.name, model=str(folder), fingerprint="") for folder in folders]

    def processes_for(models: list[ScoredModel], process: Process) -> int:
        assert set(found := step._devices(models, lambda _: process)) == {"cpu"}
        return len(found)

    assert [processes_for(unscored[:count], Process()) for count in (1, 3, 4, 7, 20)] == [1, 1, 2, 3, BESIDE]
    assert processes_for(unscored, Process(1, {"PRETEND_BACKEND": "vllm"})) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    assert processes_for(unscored, Process()) == 2
    os.truncate(folders[3] / "model.safetensors", SMALL + 1)
    assert [processes_for(unscored[:count], Process()) for count in (3, 4, 20)] == [1, 1, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert step._devices(unscored, lambda _: Process()) == ["0", "1", "2"]


@pytest.mark.parametrize(("cores", "on_cpu", "threads"), [(8, 2, 4), (8, 1, None), (2, 2, 1), (1, 2, 1), (8, 0, None)])
def test_processes_on_one_cpu_are_told_their_share_of_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, on_cpu: int, threads: int | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    told: list[Any] = []

    def child(module: str, shared: Any, *_: Any) -> Any:
        told.append(shared)
        raise InputError("seen")

    monkeypatch.setattr(step.child, "Child", child)
    with pytest.raises(InputError, match="seen"):
        scores(tmp_path, WORDS, devices=["cpu"] * on_cpu or ["0", "1"])
    assert {shared["threads"] for shared in told} == {threads}


@pytest.mark.parametrize(("told", "threads"), [(3, 3), (9, 5), (None, 5)])
def test_a_process_starts_no_more_threads_than_it_is_told_or_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int | None, threads: int
) -> None:
    (tmp_path / "processes").mkdir()
    shared = {"factor": 2, "folder": str(tmp_path / "processes")}
    monkeypatch.setattr(
        step.child, "listen", lambda: ({"out": str(tmp_path), "shared": shared, "threads": told}, iter([]), print)
    )
    set_to = [5]
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert serve(STEP) == 0 and set_to[-1] == threads


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a key"])
def test_a_damaged_result_is_named_and_scored_again(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its content is still one that can be read: a number, a word."""
    few = {"a": "one two three", "b": "one"}
    scores(tmp_path, few)
    before, file = contents(tmp_path), tmp_path / "out" / ("a.json" if name == "a key" else name)
    if name == "a key":
        file.write_text(file.read_text().replace('"seconds"', '"secondr"'))
    elif name == "a.json":
        values = json.loads(file.read_text())
        file.write_text(json.dumps({**values, "metrics": {**values["metrics"], "words": 4}}))
    else:
        assert "one" in file.read_text()
        # a flipped bit may leave no UTF-8
        file.write_bytes(file.read_bytes().replace(b"one", b"t\xf3n"))
    with caplog.at_level(logging.WARNING):
        scores(tmp_path, few)
    assert contents(tmp_path) == before
    assert "a.json is damaged, or the file with its items: not what was written; a is scored again" in caplog.text
    caplog.clear()
    scores(tmp_path, few)
    assert "damaged" not in caplog.text


def test_a_result_from_before_there_were_hashes_is_one(tmp_path: Path) -> None:
    scores(tmp_path, {"a": "one"})
    file = tmp_path / "out" / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "written": "", "seconds": 77}))
    assert scores(tmp_path, {"a": "one"})["a"]["seconds"] == 77
