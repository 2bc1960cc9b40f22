"""Generation by real runs of a tiny model that was trained for it: both backends, prompts of every format, failures, resuming."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from llmkd import cli
from llmkd.data import batches, records, tokens
from llmkd.data import rows as row_files
from llmkd.data.formats import RowFormat
from llmkd.errors import InputError
from llmkd.evaluation import generation, held_out
from llmkd.evaluation.generation import models_of, summary
from llmkd.evaluation.results import GenerationResult
from llmkd.files import ROOT
from llmkd.inference import backends, choose, vllm_setup
from llmkd.models import load, make
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation
from tests import tiny
from tests.in_process import in_process, one_after_another, stopped_at_once

ITEMS, NEW = 24, 24
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
needs_vllm = pytest.mark.skipif(
    vllm_setup.vllm_version() is None, reason="vLLM is not installed: LLMKD_VLLM=1 bash scripts/environment.sh"
)


def settings(**changes: Any) -> Evaluation:
    return Evaluation(generation=Generation(**{"items": ITEMS, "max_new_tokens": NEW, "backend": "hf", **changes}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-block Qwen3 with heads that vLLM knows, trained on the records task for a few seconds, so that its margins are real.

    Its folder has decoding settings of its own, which have no say.
    """
    folder = tmp_path_factory.mktemp("models") / "trained"
    rows = records.rows("train", 0, 0, 1600)
    tokenizer = make.new_tokenizer([row["prompt"] + row["completion"] for row in rows], 512)
    tokenizer.chat_template = TEMPLATE
    shape: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        rope_theta=10000.0,
        initializer_range=0.1,
    )
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    make.new_model(
        Qwen3Config(**shape, **special), folder, seed=0, dtype=torch.float32, tokenizer=tokenizer.save_pretrained
    )
    model: Any = load.load_causal_lm(folder, dtype=torch.float32, ds_config=None, attention="sdpa")
    ids = tokens.tokenize(
        row_files.load_rows("records", name=None, split="train", rows=1600),
        tokenizer,
        row_format=RowFormat(),
        max_length=160,
        too_long="drop",
    )
    steps, optimizer = 100, torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        batch = batches.collate([ids[i] for i in range(16 * step, 16 * step + 16)], pad_id=0, packed=False)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets.flatten(), ignore_index=batches.IGNORE
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        optimizer.step()
    model.save_pretrained(folder)
    decoding = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps({**decoding, "min_new_tokens": 20, "top_k": 3}))
    return folder


@pytest.fixture(scope="module")
def jobs(trained: Path) -> list[tuple[str, Path]]:
    """The trained model; one whose weights are cut off; one that is not there; one with twice the words' embeddings."""
    broken, other = trained.parent / "broken", trained.parent / "other"
    shutil.copytree(trained, broken)
    shutil.copytree(trained, other)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    model: Any = load.load_causal_lm(other, dtype=torch.float32, ds_config=None, attention="sdpa")
    model.get_input_embeddings().weight.data *= 2
    model.save_pretrained(other)
    return [("trained", trained), ("broken", broken), ("gone", Path("nowhere")), ("other", other)]


class _Stop(logging.Handler):
    """Interrupts us as soon as a line says that the first model is done."""

    def emit(self, record: logging.LogRecord) -> None:
        if "1/4 trained: bleu" in record.getMessage():
            raise KeyboardInterrupt


@contextmanager
def stopping() -> Iterator[None]:
    log, handler = logging.getLogger("llmkd"), _Stop(logging.INFO)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.fixture(scope="module")
def killed_and_resumed(jobs: list[tuple[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All models by Hugging Face, in a run that is interrupted after the first model, and in a second one."""
    out = tmp_path_factory.mktemp("hf")
    with stopping(), one_after_another(), pytest.raises(KeyboardInterrupt):
        generation.generate(jobs, settings(batch_size=7), Data(rows=10), out)
    there = sorted(file.name for file in out.glob("*.json*"))
    before = (out / "trained.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        orders = in_process(patch)
        files = generation.generate(jobs, settings(batch_size=7), Data(rows=10), out)
    asked = [order["model"]["name"] for order in orders]
    kept = before == (out / "trained.json").stat().st_mtime_ns
    return {"files": files, "there": there, "asked": asked, "kept": kept}


@pytest.fixture(scope="module")
def by_hf(killed_and_resumed: dict[str, Any]) -> dict[str, Path]:
    return killed_and_resumed["files"]


@pytest.fixture(scope="module")
def by_vllm(jobs: list[tuple[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("vllm")
    tied = tiny.tied_in_word(dict(jobs)["trained"], out.parent / "tied-in-word")
    return generation.generate([*jobs, ("tied in word", tied)], settings(backend="vllm"), Data(rows=10), out)


def result(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]


def test_a_result_says_what_was_made_and_with_what(by_hf: dict[str, Path], trained: Path) -> None:
    found, lines = result(by_hf["trained"]), lines_of(by_hf["trained"])
    assert found["error"] is None and found["backend"] == "hf" and found["why"] == "as the recipe says"
    assert found["model"] == str(trained) and found["dtype"] == "float32" and found["items"] == ITEMS
    assert {"llmkd", "torch", "transformers"} <= set(found["versions"])
    assert found["seconds"] > 0 and found["load_seconds"] > 0
    assert found["new_tokens"] == sum(len(line["token_ids"]) for line in lines)
    assert [line["item"] for line in lines] == list(range(ITEMS))
    for line, example in zip(lines, records.examples("test", 0, 0, ITEMS), strict=True):
        assert line["prompt"] == example["prompt"] and line["references"] == example["references"]
        assert line["scores"]["slots"] == records.slots_right(example["record"], line["text"])
    assert found["metrics"]["slots"] == pytest.approx(sum(line["scores"]["slots"] for line in lines) / ITEMS)


def test_greedy_texts_are_those_of_one_prompt_at_a_time_without_cache_or_padding(
    by_hf: dict[str, Path], trained: Path
) -> None:
    model: Any = load.load_causal_lm(trained, dtype=torch.float32, ds_config=None, attention="eager").eval()
    tokenizer = load.load_tokenizer(trained)
    lines = lines_of(by_hf["trained"])
    assert {line["finished"] for line in lines} == {True, False}, "the test wants texts of both kinds"
    for line in lines[:10]:
        ids, written = tokenizer(line["prompt"])["input_ids"], []
        while len(written) < NEW and tokenizer.eos_token_id not in written:
            with torch.no_grad():
                written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert line["token_ids"] == written
        assert line["finished"] == (written[-1] == tokenizer.eos_token_id)
        assert line["text"] == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.slow
@needs_vllm
def test_both_backends_write_the_same_in_float32(by_hf: dict[str, Path], by_vllm: dict[str, Path]) -> None:
    """Slow as all that starts vLLM's engine; Hugging Face's texts are compared with plain greedy decoding above."""
    for name in ("trained", "other"):
        ours, theirs = lines_of(by_hf[name]), lines_of(by_vllm[name])
        assert len(ours) == ITEMS and ours == theirs
        assert result(by_hf[name])["metrics"] == result(by_vllm[name])["metrics"]
    assert by_hf["trained"].with_suffix(".jsonl").read_text() != by_hf["other"].with_suffix(".jsonl").read_text()
    assert lines_of(by_vllm["tied in word"]) == lines_of(by_hf["trained"])  # the head that is stored, as transformers
    found = result(by_vllm["trained"])
    assert found["backend"] == "vllm" and found["versions"]["vllm"] == vllm_setup.vllm_version()


@pytest.mark.parametrize("backend", ["hf", pytest.param("vllm", marks=[needs_vllm, pytest.mark.slow])])
def test_a_model_that_fails_says_why_and_costs_the_others_nothing(backend: str, request: pytest.FixtureRequest) -> None:
    files = request.getfixturevalue(f"by_{backend}")
    broken, gone = result(files["broken"]), result(files["gone"])
    assert broken["error"].startswith(f"{backend} could not run this model (") and "\n" not in broken["error"]
    assert "generation.log" in broken["error"] and broken["metrics"] == {}
    assert gone["error"] == "nowhere holds no model (no config.json)"
    assert lines_of(files["broken"]) == []
    assert result(files["other"])["error"] is None
    assert "could not run" in summary(files) and "prompt 2:" in summary(files)


def test_vllm_by_name_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_setup, "vllm_version", lambda: None)
    with pytest.raises(InputError, match="evaluation.generation.backend: vLLM is not installed here; .*LLMKD_VLLM=1"):
        generation.generate([("m", trained)], settings(backend="vllm"), Data(rows=10), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_auto_takes_vllm_where_the_work_repays_its_start(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Generation(backend="auto", max_new_tokens=100)
    size = sum(
        p.numel()
        for p in load.load_causal_lm(trained, dtype=torch.float32, ds_config=None, attention="sdpa").parameters()
    )
    assert choose.parameters(trained) == size and choose.head_size(trained) == 32
    monkeypatch.setattr(choose, "vllm_version", lambda: "0.32.0+cpu")
    monkeypatch.setattr(choose, "on_cpu", lambda: True)
    enough = int(generation.WORTH_VLLM / size / 100) + 1
    assert generation.choose(auto, trained, enough)[0] == "vllm"
    backend, why = generation.choose(auto, trained, enough - 1)
    assert backend == "hf" and "too little to repay" in why
    monkeypatch.setattr(choose, "CPU_HEAD_SIZES", (64,))
    assert generation.choose(auto, trained, enough) == ("hf", "vLLM's CPU build has no attention heads of size 32")
    assert generation.choose(auto, Path("nowhere"), enough) == ("hf", "the model's size can't be read")
    monkeypatch.setattr(choose, "vllm_version", lambda: None)
    assert generation.choose(auto, trained, enough) == ("hf", "vLLM is not installed")


# --- Resuming


def test_what_was_done_before_a_kill_is_not_done_again(
    killed_and_resumed: dict[str, Any], jobs: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = killed_and_resumed
    assert run["there"] == ["trained.json", "trained.jsonl"], "nothing half written, nothing of the next model"
    assert run["asked"] == ["broken", "gone", "other"] and run["kept"]
    asked = stopped_at_once(monkeypatch)
    out = run["files"]["trained"].parent
    good = [jobs[0], jobs[3]]
    assert list(generation.generate(good, settings(batch_size=7), Data(rows=10), out)) == ["trained", "other"]
    assert asked == []
    with pytest.raises(KeyboardInterrupt):  # what failed is tried again
        generation.generate(jobs, settings(batch_size=7), Data(rows=10), out)
    assert asked == ["broken"]


def test_another_setting_model_or_prompt_is_another_result(trained: Path, jobs: list[tuple[str, Path]]) -> None:
    def fingerprint(model: Path = trained, items: int = ITEMS, **changes: Any) -> str:
        some = settings(**changes)
        return generation._unscored("m", model, some, generation.check(some, Data(rows=10))[:items]).fingerprint

    assert fingerprint() == fingerprint(backend="auto")  # hf too
    others = [fingerprint(model=jobs[3][1]), fingerprint(items=5), fingerprint(seed=1), fingerprint(max_new_tokens=9)]
    others += [fingerprint(split="validation"), fingerprint(backend="vllm"), fingerprint(temperature=0.5)]
    assert len({fingerprint(), *others}) == 1 + len(others)


# --- Sampling


def test_sampling_follows_its_seed_and_not_the_batch_beside_it(trained: Path) -> None:
    tokenizer = load.load_tokenizer(trained)
    asked = [
        ids for _, ids in held_out.encoded(held_out.held_out_prompts(Generation(items=6), Data(rows=10)), tokenizer)
    ]

    def texts(seed: int, temperature: float = 1.0) -> list[list[int]]:
        how = backends.Sampling(12, backends.stop_ids(trained, tokenizer), temperature, 0.9, seed, batch_size=6)
        return backends.by_hugging_face(trained, asked, "float32", how).token_ids

    assert texts(0) == texts(0) != texts(1)
    assert texts(0, temperature=0.0) == texts(1, temperature=0.0)


def test_every_end_that_the_folder_names_ends_a_text(trained: Path, tmp_path: Path) -> None:
    tokenizer = load.load_tokenizer(trained)
    assert backends.stop_ids(trained, tokenizer) == (tokenizer.eos_token_id,)
    shutil.copy(trained / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, tokenizer.eos_token_id, 9]}))
    assert backends.stop_ids(tmp_path, tokenizer) == (tokenizer.eos_token_id, 7, 9)


def test_chat_prompts_are_continued(trained: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a cheap inn"}, {"role": "assistant", "content": " There is one."}]
    source = tmp_path / "chats.jsonl"
    source.write_text(json.dumps({"messages": chat}) + "\n")
    some = settings(source=str(source), max_new_tokens=5)
    items = generation.check(some, Data(rows=10))
    model = GenerationResult(model=str(trained), backend="hf")
    assert some.generation is not None
    task = generation.Task(some.generation, some.dtype, items, "generation.log", False)
    result, [text] = generation.score(model, task, print)
    assert text.prompt.startswith("<user> a cheap inn") and text.references == ["There is one."]
    assert "slots" not in result.metrics and 1 <= len(text.token_ids) <= 5


def test_thoughts_are_counted_and_not_scored(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model taught by Qwen3's template begins each answer with empty thoughts, and the reference has none."""
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": "a cheap inn", "completion": "There is one."}) + "\n" for _ in range(2))
    )
    some, tokenizer = settings(source=str(source), items=2), load.load_tokenizer(trained)
    assert some.generation is not None

    def writes(*texts: str) -> GenerationResult:
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        written = backends.Continuations(ids, seconds=1.0, load_seconds=1.0)
        monkeypatch.setitem(backends.BACKENDS, "hf", lambda *_: written)
        items = generation.check(some, Data(rows=10))
        task = generation.Task(some.generation or Generation(), some.dtype, items, "generation.log", False)
        scored, lines = generation.score(GenerationResult(model=str(trained), backend="hf"), task, print)
        assert [line.text for line in lines] == list(texts) and {line.answer for line in lines} == {"There is one."}
        return scored

    plain, thinking = writes(*["There is one."] * 2), writes("<think>\n\n</think>\n\nThere is one.", "There is one.")
    assert plain.metrics == thinking.metrics and plain.metrics["bleu"] == pytest.approx(100)
    assert (plain.thoughts, thinking.thoughts) == (0, 1)


def test_a_prompt_without_room_for_its_continuation_is_refused() -> None:
    generation.check_room([("p", [1] * 10)], 6, 16)
    with pytest.raises(
        InputError, match="item 1 has 11 tokens and may get 6 more, the model has 16 positions; write at most 5"
    ):
        generation.check_room([("p", [1] * 10), ("q", [1] * 11)], 6, 16)
    with pytest.raises(InputError, match="item 0 is empty"):
        generation.check_room([("", [])], 6, None)


def test_no_section_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="evaluation.generation: the recipe asks for no texts"):
        generation.generate([], Evaluation(), Data(rows=10), tmp_path)


# --- The command


def test_the_command_runs_a_study_and_shows_what_was_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tmp_path / "study"
    shutil.copytree(trained, study / "teacher" / "model")
    entries = [
        {"name": name, "kind": kind, "model": model, "train": train, "strategy": strategy, "seed": seed}
        for name, kind, strategy, seed, model, train in (
            ("teacher", "teacher", None, None, "teacher/model", "teacher"),
            ("forward-s0", "student", "forward", 0, "students/forward-s0/model", "students/forward-s0"),
            ("given", "baseline", None, None, str(trained), None),
        )
    ]
    (study / "study.json").write_text(json.dumps({"name": "made-up", "entries": entries}))
    assert models_of([study]) == [("teacher", study / "teacher" / "model"), ("given", trained)]
    with pytest.raises(InputError, match="two models are called 'teacher'; run each alone"):
        models_of([study, study / "teacher" / "model"])

    in_process(monkeypatch)
    shutil.copy(ROOT / "recipes" / "quickstart.yaml", study / "recipe.yaml")
    sets = ["--set", "evaluation.generation.max_new_tokens=6"]
    cli.main(["generate", str(study), "--items", "2", "--backend", "hf", *sets])
    said = capsys.readouterr().out
    found = result(study / "generations" / "teacher.json")
    assert found["items"] == 2 and f"{found['metrics']['bleu']:.4g}" in said
    assert "BLEU" in said and "prompt 1: name " in said and str(study / "generations" / "given.json") in said
    cli.main(["generate", str(trained), "--items", "1", "--backend", "hf", "--output", str(tmp_path / "there"), *sets])
    assert (tmp_path / "there" / "trained.jsonl").is_file()
