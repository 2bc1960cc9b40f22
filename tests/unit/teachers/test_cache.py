"""A cache is what the teacher said, whole, or it is refused by name; interrupted writing loses nothing that was published."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmkd.data.batches import Batch, collate
from llmkd.errors import InputError
from llmkd.losses.chunked_head import head_losses
from llmkd.losses.divergences import DIVERGENCES
from llmkd.losses.head_inputs import Terms, TopK
from llmkd.models import load as models
from llmkd.models import parts
from llmkd.planning import cache, memory
from llmkd.processes import Stopping, only_one_in
from llmkd.recipe import study_entries
from llmkd.recipe.recipe import Recipe, load_recipe
from llmkd.teachers import cache_files
from llmkd.teachers.cached import AHEAD, CacheTeacher
from llmkd.teachers.quantization import restored, stored
from llmkd.train import train
from llmkd.training import build, cache_contents, initial, jobs, write_cache
from llmkd.training.tokens import tokens_of
from tests import definitions

WRITTEN = {
    "cache.dtype": "float32",
    "cache.shard_mib": 0.05,
    "teacher.placement": "cache",
    "train.steps": 1,
    "train.warmup_steps": 0,
}


class Never(Stopping):
    """No signal comes."""

    def __init__(self) -> None:
        self.asked, self.name = False, "nothing"


class After(Stopping):
    """A signal comes once it has been asked so many times."""

    def __init__(self, times: int) -> None:
        self._left, self.name = times, "SIGTERM"

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self._left -= 1
        return self._left < 0


@pytest.fixture(scope="module")
def recipe(tiny: Path) -> Recipe:
    return load_recipe(tiny / "recipe.yaml").changed({**WRITTEN, "train.deepspeed": str(tiny / "zero1.json")})


@pytest.fixture(scope="module")
def whole(recipe: Recipe, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole cache of the recipe's forward map."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    assert write_cache.cache(world, recipe.changed({"cache.path": str(folder)}), Never())
    return folder


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def _flip(folder: Path) -> None:
    data = bytearray((folder / "shard-00002.safetensors").read_bytes())
    data[-100] ^= 1
    (folder / "shard-00002.safetensors").write_bytes(data)


def _truncate(folder: Path) -> None:
    file = folder / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _other_header(folder: Path) -> None:
    """Tensors swapped for others of the same size: the size agrees, the header does not."""
    file = folder / "shard-00001.safetensors"
    size = file.stat().st_size
    tensors = load_file(file)
    save_file({"block.9" if k == "block.1" else k: v for k, v in tensors.items()}, file)
    assert file.stat().st_size == size


def _manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"tokens": 644', '"tokens": 645'))


def _unfinished(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "plan.json")


DAMAGES: dict[str, tuple[Any, str]] = {
    "flipped byte": (_flip, r"shard-00002.safetensors: does not have the checksum it was written with, so nothing is"),
    "truncated shard": (_truncate, r"shard-00001.safetensors: has \d+ bytes where \d+ were written"),
    "other header": (_other_header, "shard-00001.safetensors: has another header"),
    "missing shard": (lambda f: (f / "shard-00003.safetensors").unlink(), "shard-00003.safetensors: is missing"),
    "changed manifest": (_manifest, "manifest.json: was changed since it was written; remove"),
    "broken manifest": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: can't be read; remove"),
    "unfinished": (_unfinished, "teacher.placement: .* is not finished; run llmkd cache with this recipe"),
    "nothing": (shutil.rmtree, "teacher.placement: .* holds no cache; run llmkd cache with this recipe"),
}


def _refused(world: Any, recipe: Recipe, run: Path) -> str:
    """The sentence by which training is refused, before the run's folder is made."""
    with pytest.raises(InputError) as error:
        train(world, jobs.distil_job(world, recipe, run), Never())  # type: ignore[arg-type]
    assert not run.exists()
    return str(error.value)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_cache_is_refused_by_name_and_made_whole_again(
    recipe: Recipe, world: Any, whole: Path, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(whole, folder)
    damage, sentence = DAMAGES[what]
    damage(folder)
    here = recipe.changed({"cache.path": str(folder)})
    said = _refused(world, here, tmp_path / "run")
    assert re.search(sentence, said), said
    if "shard" not in said:
        return
    kept = {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.name not in said}
    assert write_cache.cache(world, here, Never())
    assert _bytes(folder) == _bytes(whole)
    again = {name for name, when in kept.items() if (folder / name).stat().st_mtime_ns != when}
    assert again == {"manifest.json"}


def _other_teacher(tiny: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(tiny / "teacher", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"teacher.path": str(folder)}


def _other_tokenizer(tiny: Path, folder: Path) -> dict[str, Any]:
    """The same weights; two tokens have changed places."""
    shutil.copytree(tiny / "teacher", folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    (a, b) = [t for t, i in vocabulary.items() if i in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return {"teacher.path": str(folder)}


def _other_rows(tiny: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    text = (tiny / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(text.replace("red", "bird", 1))
    return {"data.source": str(folder / "rows.jsonl")}


OTHERS: dict[str, tuple[Any, str]] = {
    "teacher": (_other_teacher, "was made of another teacher"),
    "teacher's dtype": (
        {"teacher.dtype": "bfloat16"},
        r"another dtype \(teacher.dtype was 'float32', now 'bfloat16'\)",
    ),
    "tokenizer": (_other_tokenizer, "was made of another tokenizer"),
    "rows": (_other_rows, r"was made of other data \(data.source was"),
    "data keys": ({"data.max_length": 20}, r"was made of other data \(data.max_length was 64, now 20\)"),
    "too few blocks": ({"matching.strategy": "all_to_one"}, "holds block.1, block.3, block.5, final and lacks block.2"),
    "no embeddings": ({"matching.embedding": True}, "and lacks embedding; put the recipe back"),
    "cache's dtype": ({"cache.dtype": "fp8"}, "stores float32, the recipe's cache.dtype is fp8"),
    "top_k": ({"cache.top_k": 8}, r"holds no log-probabilities, the recipe asks for cache.top_k 8 \(of 320\)"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_cache_is_refused_by_name(
    recipe: Recipe, world: Any, tiny: Path, whole: Path, tmp_path: Path, what: str
) -> None:
    other, sentence = OTHERS[what]
    changes = other if isinstance(other, dict) else other(tiny, tmp_path / "other")
    changed = recipe.changed({"cache.path": str(whole), **changes})
    said = _refused(world, changed, tmp_path / "run")
    assert re.search(sentence, said), said
    before = _bytes(whole)
    with pytest.raises(InputError, match="put the recipe back, remove that folder, or set cache.path"):
        write_cache.cache(world, changed, Never())  # nor is it written over
    assert _bytes(whole) == before


def test_a_cache_without_final_state_is_refused_where_it_is_needed(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    here = recipe.changed({"cache.path": str(tmp_path / "cache")})
    assert write_cache.cache(world, here.changed({"loss.kl": 0.0}), Never())
    assert "holds no final state, which the divergence (loss.kl)" in _refused(world, here, tmp_path / "run")
    normed = here.changed({"loss.kl": 0.0, "matching.final_state": "normed"})
    assert "holds no final state" in _refused(world, normed, tmp_path / "run")


def test_a_byte_that_flips_is_found_when_it_is_read_and_made_anew(
    recipe: Recipe, world: Any, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole, tmp_path / "cache")
    _flip(tmp_path / "cache")
    changed = recipe.changed({"cache.path": str(tmp_path / "cache"), "cache.verify": "read", "train.steps": 5})
    with pytest.raises(InputError, match="shard-00002.safetensors: does not have the checksum"):
        train(world, jobs.distil_job(world, changed, tmp_path / "run"), Never())  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "model").exists()
    flipped = _bytes(tmp_path / "cache")
    assert write_cache.cache(world, changed, Never(), trusted=True)  # as a study asks, which has training look
    assert _bytes(tmp_path / "cache") == flipped
    with caplog.at_level("INFO"):
        assert write_cache.cache(world, changed, Never())
    assert "with their checksums" in caplog.text and "shard-00002.safetensors does not have the checksum" in caplog.text
    assert _bytes(tmp_path / "cache") == _bytes(whole)


def test_one_cache_serves_students_who_ask_for_more_than_the_study_s_recipe(
    recipe: Recipe, world: Any, tmp_path: Path
) -> None:
    """The recipe compares the last pair after the final norm and takes no divergence; one variant compares it raw, another takes one."""
    variants = {"raw": {"matching.final_state": "raw"}, "taught": {"loss.kl": 1.0, "loss.temperature": 2.0}}
    here = recipe.changed({
        "cache.path": str(tmp_path / "cache"), "loss.kl": 0.0, "matching.strategy": "reverse", "train.steps": 2,
        "matching.final_state": "normed", "study.strategies": ["forward"], "study.variants": variants,
        "teacher.share_cache": True, "teacher.placement": "replicated",
    })  # fmt: skip
    assert write_cache.cache(world, here, Never())
    contents = json.loads((tmp_path / "cache" / "manifest.json").read_text())["contents"]
    assert contents["blocks"] == [1, 3, 5] and contents["final"]
    planned = {row.what: row.bytes for row in memory.plan(here.changed({"teacher.placement": "cache"}), 1)}
    assert planned["teacher's cache"] == 1000 * 64 * 4 * 32 * 4  # rows the plan takes, and four states
    students = [entry for entry in study_entries.study_entries(here) if entry.kind == "student"]
    assert [entry.strategy for entry in students] == ["forward", "raw", "taught"]
    for entry in students:
        one = study_entries.entry_recipe(here, entry)
        online = one.changed({"teacher.placement": "replicated", "teacher.share_cache": False})
        last: dict[str, dict[str, Any]] = {}
        for name, run in (("cached", one), ("online", online)):
            folder = tmp_path / f"{entry.name}-{name}"
            assert train(world, jobs.distil_job(world, run, folder), Never())  # type: ignore[arg-type]
            last[name] = json.loads((folder / "summary.json").read_text())["last"]
        parts = ["loss", "ce", "hidden", *(["kl"] if entry.strategy == "taught" else [])]
        for part in parts:
            assert last["cached"][part] == pytest.approx(last["online"][part], rel=2e-5), (entry.name, part)
            assert last["cached"][part] > 0
        assert "kl" in parts or not any("kl" in values for values in last.values())


def test_a_top_k_cache_is_for_forward_kl(recipe: Recipe) -> None:
    with pytest.raises(InputError, match="loss.divergence: jsd needs .* write divergence: forward_kl, or leave out"):
        recipe.changed({"cache.top_k": 8, "loss.divergence": "jsd"})
    assert recipe.changed({"cache.top_k": 8, "loss.divergence": "jsd", "teacher.placement": "replicated"})


def test_what_can_not_be_cached_is_refused(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    here = recipe.changed({"cache.path": str(tmp_path / "cache"), "loss.kl": 0.0, "matching.strategy": "none"})
    with pytest.raises(InputError, match="nothing to cache"):
        write_cache.cache(world, here.changed({"loss.hidden": 0.0}), Never())
    with pytest.raises(InputError, match="cache.top_k: 321 of 320 tokens"):
        write_cache.cache(world, here.changed({"loss.kl": 1.0, "cache.top_k": 321}), Never())
    assert not (tmp_path / "cache").exists()


def test_a_disk_too_small_is_said_before_anything_is_written(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 10**5, 10**5))
    folder = tmp_path / "deep" / "cache"
    with caplog.at_level("INFO"), pytest.raises(InputError, match="GiB free; write cache.dtype: fp8.*cache.top_k: 64"):
        write_cache.cache(world, recipe.changed({"cache.path": str(folder)}), Never())
    assert list(tmp_path.iterdir()) == []
    assert "40 rows, 644 tokens" in caplog.text and "block.3" in caplog.text and "in all" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# What is computed again


@pytest.fixture
def runs_of_teacher(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The rows of every pass of a teacher that is made from now on."""
    seen: list[tuple[int, ...]] = []
    load = build.load_teacher

    def watched(*arguments: Any) -> Any:
        teacher = load(*arguments)
        signals = teacher.signals

        def noted(batch: Batch, *uses: Any) -> Any:
            seen.append(batch.rows)
            return signals(batch, *uses)

        teacher.signals = noted  # type: ignore[method-assign]
        return teacher

    monkeypatch.setattr(build, "load_teacher", watched)
    return seen


def test_stopped_writing_goes_on_at_the_next_row(
    recipe: Recipe, world: Any, whole: Path, tmp_path: Path, runs_of_teacher: list[tuple[int, ...]]
) -> None:
    two = recipe.changed(
        {"cache.shard_mib": 0.2, "cache.micro_batch_size": 2}
    )  # two shards, each of about ten micro-batches
    here, reference = (two.changed({"cache.path": str(tmp_path / name)}) for name in ("cache", "reference"))
    for times in (6, 2, 9):
        assert not write_cache.cache(world, here, After(times))
        assert len(list((tmp_path / "cache").glob("*.partial.safetensors"))) == 1
        assert not (tmp_path / "cache" / "manifest.json").exists()
    assert write_cache.cache(world, here, Never())
    assert sorted(row for rows in runs_of_teacher for row in rows) == list(range(40))  # each once
    assert write_cache.cache(world, reference, Never())
    tensors, expected = ({f.name: load_file(f) for f in sorted(p.glob("*.safetensors"))} for p in
                         (tmp_path / "cache", tmp_path / "reference"))  # fmt: skip
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[f][k], v) for f in expected for k, v in expected[f].items())
    before = len(runs_of_teacher)
    assert write_cache.cache(world, here, Never()) and len(runs_of_teacher) == before  # whole: nothing is run


def test_the_bar_counts_the_rows_that_a_stopped_writing_has_left(
    recipe: Recipe, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[float, list[float]]] = []

    def progress(work: str, *, total: float, unit: str, shown: bool) -> Any:
        assert (work, unit, shown) == ("cache, rank 0", "rows", True)
        runs.append((total, []))
        return contextlib.nullcontext(runs[-1][1].append)

    monkeypatch.setattr(write_cache, "progress", progress)
    here = recipe.changed({"cache.shard_mib": 0.2, "cache.micro_batch_size": 2, "cache.path": str(tmp_path / "cache")})
    assert not write_cache.cache(world, here, After(6))
    assert write_cache.cache(world, here, Never())
    (total, stopped), (left, moved) = runs
    done = stopped[1:]  # how many: tokenizing asks for signals too
    assert total == left == sum(moved) == 40 and stopped[0] == 0 and done and set(done) == {2}
    assert moved[0] == sum(done)  # in the partial shard


def test_killed_writing_loses_the_shard_under_way_alone(
    recipe: Recipe, world: Any, whole: Path, tmp_path: Path, runs_of_teacher: list[tuple[int, ...]]
) -> None:
    here = recipe.changed({"cache.path": str(tmp_path / "cache")})
    assert not write_cache.cache(world, here, After(5))
    for file in (tmp_path / "cache").glob("*.partial.*"):
        file.unlink()  # a kill leaves no partial shard
    (tmp_path / "cache" / "shard-00004.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "cache" / "shard-00003.safetensors").write_bytes(b"published, but without a record")
    done = sorted(f.stem for f in (tmp_path / "cache").glob("shard-*.json"))
    runs_of_teacher.clear()
    assert write_cache.cache(world, here, Never())
    assert _bytes(tmp_path / "cache") == _bytes(whole)  # no .tmp is left over
    ranges = [(s["first"], s["last"]) for s in json.loads((whole / "manifest.json").read_text())["shards"]]
    left = [row for n, (a, b) in enumerate(ranges) if f"shard-{n:05d}" not in done for row in range(a, b)]
    assert len(done) >= 1 and sorted(row for rows in runs_of_teacher for row in rows) == left


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_without_a_plan_as_it_was_written_no_shard_counts(
    recipe: Recipe, world: Any, whole: Path, tmp_path: Path, runs_of_teacher: list[tuple[int, ...]], what: str
) -> None:
    """It alone says of what the shards of a cache under way are made."""
    here = recipe.changed({"cache.path": str(tmp_path / "cache")})
    assert not write_cache.cache(world, here, After(5))
    plan = tmp_path / "cache" / "plan.json"
    if what == "changed":
        plan.write_text(plan.read_text().replace("block", "clock", 1).replace("teacher.path", "teacher.qath", 1))
        with pytest.raises(InputError, match=r"plan\.json: was changed since it was written; remove "):
            write_cache.cache(world, here, Never())
    plan.unlink()
    runs_of_teacher.clear()
    assert write_cache.cache(world, here, Never())
    assert _bytes(tmp_path / "cache") == _bytes(whole)
    rows = json.loads((whole / "manifest.json").read_text())["contents"]["rows"]
    assert sorted(row for rows in runs_of_teacher for row in rows) == list(range(rows))


def test_a_partial_shard_that_was_changed_is_not_gone_on_with(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    here = recipe.changed({"cache.path": str(tmp_path / "cache"), "cache.shard_mib": 1, "cache.micro_batch_size": 8})
    assert not write_cache.cache(world, here, After(2))
    (partial,) = (tmp_path / "cache").glob("*.partial.safetensors")
    assert cache_files.read_partial(partial) is not None
    data = bytearray(partial.read_bytes())
    data[-9] ^= 1
    partial.write_bytes(data)
    assert cache_files.read_partial(partial) is None


@pytest.mark.slow
def test_sigterm_to_the_command_saves_and_exits_0(tiny: Path, tmp_path: Path) -> None:
    sets = ["data.source=records", "data.rows=1500", "data.max_length=400", "cache.shard_mib=2"]
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    shape = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 512}))
    sets += [f"teacher.path={tmp_path / 'teacher'}", "train.batch_size=4", "train.micro_batch_size=1"]
    command = ["cache", str(tiny / "recipe.yaml"), "--ranks", "2", "--output", str(tmp_path / "cache")]
    command += [part for one in sets for part in ("--set", one)]
    code = "import sys; from llmkd.cli import main; main(sys.argv[1:])"

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    process = start()
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("cache/shard-*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "stopped by" in out and "the same command resumes from it" in out, out
    assert not (tmp_path / "cache" / "manifest.json").exists()
    process = start()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "cache: done" in out, out
    assert not list((tmp_path / "cache").glob("*.partial.*"))


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def _open(world: Any, recipe: Recipe, folder: Path, **changes: Any) -> tuple[CacheTeacher, Any, Any]:
    changed = recipe.changed({"cache.path": str(folder), **changes})
    job = jobs.distil_job(world, changed, folder / "run")
    tokenizer = initial.job_tokenizer(world, job, resuming=False)
    data = tokens_of(world, job, tokenizer)
    teacher = cache_contents.open_teacher(world, job, tokenizer, data)
    assert teacher is not None
    online = build.load_teacher(
        world, jobs.distil_job(world, changed.changed({"teacher.placement": "replicated"}), folder / "run")
    )
    return teacher, online, data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("verify", ["start", "read"])
def test_signals_in_any_order_are_the_teacher_s(
    recipe: Recipe, world: Any, whole: Path, packed: bool, verify: str
) -> None:
    cached, online, data = _open(world, recipe, whole, **{"cache.verify": verify})
    order = np.random.default_rng(0).permutation(40)
    batches = [
        collate([data.row(r) for r in rows], pad_id=0, packed=packed, numbers=rows.tolist())
        for rows in np.array_split(order, 7)
    ]
    cached.expect(batches[:5])  # a step of five micro-batches, and two that nobody told of
    for number, batch in enumerate(batches):
        ours, theirs = cached.signals(batch), online.signals(batch)
        assert sum(c.values is not None for c in cached._coming) <= AHEAD, number
        assert ours.held == theirs.held == 3
        for block in (1, 3, 5):
            a, b = ours.take(block), theirs.take(block)
            assert a.shape == b.shape and a.dtype == b.dtype
            assert (a - b)[batch.attended].norm() <= 1e-5 * b[batch.attended].norm()
            assert not a[~batch.attended].any()
        assert ours.held == 0
        a, b = ours.take_final(), theirs.take_final()
        assert a is not None and b is not None
        assert (a - b)[batch.attended].norm() <= 1e-5 * b[batch.attended].norm()
        assert ours.head is not None and theirs.head is not None
        with ours.head() as (weight, bias), theirs.head() as (expected, _):
            assert torch.equal(weight, expected) and bias is None


def test_no_weight_of_the_teacher_is_loaded_but_its_head(
    recipe: Recipe, world: Any, whole: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Path] = []
    tensors: list[str] = []
    load, opened = models.load_model, models.safe_open

    class Watched:
        def __init__(self, file: Path, **options: Any) -> None:
            self._inner, self._file = opened(file, **options), Path(file)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def keys(self) -> Any:
            return self._inner.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            tensors.append(name)
            return self._inner.get_tensor(name)

    monkeypatch.setattr(models, "load_model", lambda folder, **o: (loaded.append(folder), load(folder, **o))[1])
    changed = recipe.changed({"cache.path": str(whole)})
    job = jobs.distil_job(world, changed, tmp_path / "run")
    tokenizer = initial.job_tokenizer(world, job, resuming=False)
    data = tokens_of(world, job, tokenizer)
    monkeypatch.setattr(models, "safe_open", Watched)
    cache_contents.open_teacher(world, job, tokenizer, data)
    monkeypatch.setattr(models, "safe_open", opened)
    assert tensors == ["lm_head.weight"]
    assert train(world, job, Never())  # type: ignore[arg-type]
    assert loaded == [tmp_path / "run" / "initial"]


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "gpt_neox", "phi"])
def test_a_head_alone_is_the_model_s(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    name, _, tied = kind.partition("-")
    config = AutoConfig.for_model(name, **small, tie_word_embeddings=bool(tied))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    head = parts.head(model)
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    weight, bias = models.load_head(tmp_path, dtype=torch.float32)
    assert torch.equal(weight, head.weight)
    assert (bias is None) == (head.bias is None) == (kind != "phi")
    assert bias is None or torch.equal(bias, head.bias)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("bfloat16", 2**-8), ("fp8", 2**-4), ("int8", 1 / 254)])
def test_a_stored_state_is_near(dtype: str, error: float) -> None:
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    states[7] = 0
    values, scales = stored(states, dtype)
    found = restored(values, scales, torch.float32)
    largest = states.abs().amax(-1, keepdim=True)
    bound = error * (largest if dtype == "int8" else states.abs()) + (largest * 2**-18 if dtype == "fp8" else 0)
    assert ((found - states).abs() <= bound * 1.001).all() and torch.isfinite(found).all()
    assert dtype == "float32" or not torch.equal(found, states)
    assert torch.equal(restored(*stored(found, dtype), torch.float32), found)  # storing again loses nothing more


def test_two_commands_do_not_write_one_cache(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with (
        only_one_in(folder),
        pytest.raises(InputError, match=rf"^{folder}: process {os.getpid()} on .* works in this folder"),
    ):
        write_cache.cache(world, recipe.changed({"cache.path": str(folder)}), Never())


def test_shards_are_cut_by_size_alone() -> None:
    lengths = [5, 1, 1, 9, 30, 2, 2, 2]
    ranges = cache_files.shard_ranges(lengths, 10, 100)
    assert ranges == [(0, 3), (3, 4), (4, 5), (5, 8)]  # row 4 is larger than a shard, and is one
    assert (
        cache_files.shard_ranges(lengths, 10, 10**9) == [(0, 8)] and len(cache_files.shard_ranges(lengths, 10, 1)) == 8
    )


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize(("k", "columns"), [(1, 19), (5, 19), (17, 17), (5, 17)])
def test_top_k_in_the_head_is_its_definition(k: int, columns: int, chunk: int) -> None:
    """Against autograd on whole logits, where the student's vocabulary is larger than the teacher's too."""
    draw = torch.Generator().manual_seed(k)
    states = torch.randn(11, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(11, columns, generator=draw, dtype=torch.float64).log_softmax(-1).topk(k)
    compared = torch.arange(11) % 3 != 0
    hidden = torch.where(compared[:, None], teacher.values, float("nan"))  # what is not compared may hold anything
    known = TopK(torch.where(compared[:, None], teacher.indices, 10**6).int(), hidden, columns)
    targets = torch.full((11,), -100)
    terms = Terms(0.0, 0.7, DIVERGENCES["forward_kl"], 1.7)
    loss, _, kl = head_losses(states, weight, None, known, targets, compared, terms, chunk=chunk)
    values = definitions.top_k_kl((states @ weight.T)[:, :columns], teacher.indices, teacher.values, 1.7)
    expected = values[compared].sum()
    assert kl == pytest.approx(expected.item(), rel=1e-12)
    ours = torch.autograd.grad(loss, [states, weight])
    theirs = torch.autograd.grad(0.7 * expected, [states, weight])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_batch_keeps_its_rows_on_any_device() -> None:
    rows = [{"input_ids": [1, 2, 3], "trained": [False, True, True]}, {"input_ids": [4, 5], "trained": [True, True]}]
    batch = collate(rows, pad_id=0, packed=False, numbers=[7, 3])
    assert batch.to(torch.device("cpu")).rows == (7, 3)
    assert collate(rows, pad_id=0, packed=True).to(torch.device("cpu")).rows == ()


def test_the_plan_counts_the_bytes_on_disk(recipe: Recipe, world: Any, tmp_path: Path) -> None:
    study = {"study.strategies": ["forward", "all_to_one"], "cache.shard_mib": 8, "cache.path": str(tmp_path / "cache")}
    here = recipe.changed({**study, "cache.dtype": "int8", "cache.top_k": 9, "data.rows": 40, "data.max_length": 64})
    assert write_cache.cache(world, here, Never())
    (shard,) = json.loads((tmp_path / "cache" / "manifest.json").read_text())["shards"]
    planned = {row.what: row for row in memory.plan(here, 1)}
    on_disk = planned["teacher's cache"]
    assert on_disk.place == "disk" and on_disk.bytes * shard["tokens"] == pytest.approx(
        shard["bytes"] * 40 * 64, rel=0.05
    )
    per_token = 4 * (32 + 4) + 9 * 8  # blocks 1, 2, 3 and 5 in int8 with a scale; an id and a log-probability each
    assert on_disk.bytes == 40 * 64 * per_token
    forward = 3 * (32 + 4) + 9 * 8
    assert planned["teacher states, read ahead"].bytes == 3 * 4 * 64 * forward
    assert "teacher head" not in planned and planned["teacher top k"].bytes == 4 * 64 * 9 * 8
    whole = {row.what: row.bytes for row in memory.plan(here.changed({"cache.top_k": None}), 1)}
    assert whole["teacher head"] == 320 * 32 * 4 and "teacher weights" not in whole


@pytest.mark.parametrize(
    ("pairs", "most"),
    [(((0, 1), (1, 3), (2, 5)), 1), (((0, 2), (1, 2), (2, 2)), 1), (((0, 5), (1, 3), (2, 5), (3, 3)), 2)],
)
def test_states_on_the_device_at_once(pairs: Any, most: int) -> None:
    assert cache.states_at_once(pairs) == most


@pytest.fixture(scope="module")
def last_values(recipe: Recipe, world: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a student logs last when a bfloat16 teacher is there, and from its cache in each dtype."""
    folder = tmp_path_factory.mktemp("dtypes")
    found = {}
    for name in ("online", "bfloat16", "fp8", "int8", "top_k"):
        dtype, top_k = ("float32", 64) if name == "top_k" else ("bfloat16" if name == "online" else name, None)
        here = recipe.changed({
            "teacher.dtype": "bfloat16", "train.steps": 15, "cache.dtype": dtype, "cache.top_k": top_k,
            "cache.path": str(folder / f"cache-{name}"), "train.micro_batch_size": 8, "train.log_every": 5,
        })  # fmt: skip
        if name == "online":
            here = here.changed({"teacher.placement": "replicated"})
        else:
            assert write_cache.cache(world, here, Never())
        assert train(world, jobs.distil_job(world, here, folder / name), Never())  # type: ignore[arg-type]
        found[name] = json.loads((folder / name / "summary.json").read_text())["last"]
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-3), ("fp8", 3e-3), ("int8", 3e-3)])
def test_the_final_kl_from_a_cache_is_near_the_teacher_s(
    last_values: dict[str, dict[str, Any]], dtype: str, tolerance: float
) -> None:
    for part in ("kl", "hidden"):
        assert last_values[dtype][part] == pytest.approx(last_values["online"][part], rel=tolerance), part


def test_kl_to_the_likeliest_tokens_is_less_but_near(last_values: dict[str, dict[str, Any]]) -> None:
    """The rest in one bucket hides differences, and only hides: of 320 tokens 64 hold nearly all mass."""
    online, known = last_values["online"]["kl"], last_values["top_k"]["kl"]
    assert 0.8 * online < known < online
