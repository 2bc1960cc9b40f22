"""What a finished run, or a model folder of a study, leaves: damage to it is named, refused or made good, and nothing else is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmkd.distributed import checksums
from llmkd.errors import InputError
from llmkd.processes import only_one_in


@pytest.fixture(autouse=True)
def _told_anew() -> None:
    checksums._tell.cache_clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder, with a checkpoint and a lock beside."""
    for name, text in {
        "model/llmkd.json": json.dumps({"inputs": {"seed": 0}}),
        "model/model.safetensors": "weights",
        "model/adapter/adapter_model.safetensors": "adapters",
        "model/README.md": "card",
        "metrics.jsonl": "lines",
        "checkpoints/step-00000001/state.json": "{}",
        ".lock": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    checksums.finish(tmp_path, {"steps": 3})
    return tmp_path


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: list[Callable[[Path], object]] = [_flip, _cut, Path.unlink]


def test_a_finished_run_is_finished_also_where_it_was_copied_or_its_card_was_edited(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / ".lock").unlink()
    (run / "checkpoints" / "step-00000001" / "state.json").unlink()
    (run / "model" / "README.md").write_text("my card")
    os.utime(run / "model" / "model.safetensors")  # another time of change, the same bytes
    assert checksums.is_finished(run) and caplog.text == ""
    assert json.loads((run / "summary.json").read_text()) == {"steps": 3}


def test_a_run_from_before_there_were_checksums_is_finished(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checksums.json").unlink()
    assert checksums.is_finished(run) and caplog.text == ""
    _cut(run / "summary.json")
    assert not checksums.is_finished(run)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "llmkd.json", "adapter/adapter_model.safetensors"])
def test_a_damaged_model_is_refused_with_the_cure(run: Path, name: str, damage: Callable[[Path], object]) -> None:
    damage(run / "model" / name)
    if not (run / "model" / "llmkd.json").is_file():
        assert not checksums.is_finished(run)  # as after a kill: the last checkpoint is exported again
        return
    with pytest.raises(InputError, match=f"{name} is damaged: .*; put it back, or remove {run / 'model'} to have"):
        checksums.is_finished(run)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("name", "finished", "said"),
    [
        ("metrics.jsonl", True, "metrics.jsonl is not what was written when the run ended; what a report shows of it"),
        ("summary.json", False, "summary.json is not what was written when the run ended; it is written again"),
        ("checksums.json", True, "checksums.json is damaged, so that nothing of"),
    ],
)
def test_other_damage_is_told_once(
    run: Path, name: str, finished: bool, said: str, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    damage(run / name)
    assert checksums.is_finished(run) == checksums.is_finished(run) == finished
    missing = damage is Path.unlink and name != "metrics.jsonl"
    assert caplog.text.count(said) == (not missing)


def test_a_summary_that_is_another_file_is_none(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    summary, sums = ((run / name).read_bytes() for name in ("summary.json", "checksums.json"))
    (run / "summary.json").write_bytes(sums)
    (run / "checksums.json").write_bytes(summary)
    assert not checksums.is_finished(run) and "checksums.json is damaged" in caplog.text


def test_what_a_damaged_llmkd_json_says_is_not_used(run: Path) -> None:
    assert checksums.meta_of(run) == {"inputs": {"seed": 0}}
    for text in ("{", "[]", "{}", '{"inputs": 1}'):
        (run / "model" / "llmkd.json").write_text(text)
        with pytest.raises(InputError, match="llmkd.json is damaged: "):
            checksums.meta_of(run)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "llmkd.json", "checksums.json"])
def test_a_published_folder_that_is_damaged_is_made_again(
    tmp_path: Path, name: str, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text(file)
    assert not checksums.is_published(tmp_path, "{}")
    checksums.publish(tmp_path, "{}")
    assert checksums.is_published(tmp_path, "{}") and not checksums.is_published(tmp_path, "{} ")
    damage(tmp_path / name)
    assert not checksums.is_published(tmp_path, "{}")
    assert (f"{tmp_path / name} is not what was written" in caplog.text) == (
        name in ("config.json", "model.safetensors")
    )


def test_the_lock_of_a_finished_run_goes_with_its_holder(run: Path) -> None:
    assert (run / ".lock").is_file() and checksums.is_finished(run) and not (run / ".lock").exists()
    with only_one_in(run):
        assert checksums.is_finished(run) and (run / ".lock").is_file()
