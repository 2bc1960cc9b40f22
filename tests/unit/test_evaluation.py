"""Evaluation by real lm-eval runs of tiny random models: scores, failures, skipping, padding, lm-eval's own command."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmkd import evaluation, records
from llmkd.config import ROOT, Evaluation
from llmkd.errors import InputError

TASKS = ("records_generation", "records_choice")
LIMIT = 4


def settings(**changes: Any) -> Evaluation:
    return Evaluation(**{"tasks": TASKS, "limit": LIMIT, "batch_size": 3, **changes})


def make_model(folder: Path, seed: int) -> Path:
    """A random 2-block Qwen3 with a byte-level BPE of its own; pad is not eos."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([e["prompt"] + e["completion"] for e in records.examples("train", 0, 0, 200)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,  # so that what comes out hangs on what went in
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two good models, and between them one whose weights are cut off."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: make_model(folder / name, seed) for name, seed in (("first", 0), ("broken", 1), ("last", 2))}
    weights = made["broken"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return made


@pytest.fixture(scope="module")
def scored(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three models, and one that is not there, evaluated by one call."""
    jobs = [("gone", Path("nowhere")), *models.items()]
    return evaluation.evaluate(jobs, settings(), tmp_path_factory.mktemp("evaluations"))


def samples(file: Path, task: str) -> list[dict[str, Any]]:
    lines = file.with_suffix(".samples.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["task"] == task]


def test_scores_of_a_good_model(scored: dict[str, Path]) -> None:
    found = json.loads(scored["first"].read_text())
    assert found["error"] is None and found["name"] == "first" and found["backend"] == "hf"
    assert set(found["tasks"]["records_generation"]) == {"bleu", "chrf", "slots_exact", "slots"}
    assert set(found["tasks"]["records_choice"]) == {"acc"}
    assert found["items"] == dict.fromkeys(TASKS, LIMIT)
    assert set(found["versions"]) == {"llmkd", "lm_eval", "transformers", "torch", "sacrebleu"}
    assert found["seconds"] > 0


def test_scores_are_those_of_the_samples(scored: dict[str, Path]) -> None:
    """BLEU, chrF, the slots and the accuracy, computed again from what the model said."""
    import sacrebleu

    found = json.loads(scored["last"].read_text())["tasks"]
    said = samples(scored["last"], "records_generation")
    made = records.examples("test", 0, 0, LIMIT)
    assert [line["prompt"] for line in said] == [example["prompt"] for example in made]
    texts = [line["output"][0].strip() for line in said]
    most = max(len(line["references"]) for line in said)
    streams = [[(line["references"] + [None] * most)[k] for line in said] for k in range(most)]
    assert found["records_generation"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    assert found["records_generation"]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score)
    shares = [records.slots_right(e["record"], text) for e, text in zip(made, texts, strict=True)]
    assert found["records_generation"]["slots"] == pytest.approx(sum(shares) / LIMIT)
    chosen = samples(scored["last"], "records_choice")
    best = [max(range(4), key=lambda k: line["output"][k][0]) for line in chosen]
    golds = [records.choices(example)[1] for example in made]
    assert found["records_choice"]["acc"] == pytest.approx(
        sum(b == g for b, g in zip(best, golds, strict=True)) / LIMIT
    )
    assert all(line["choices"][line["target"]] == e["completion"] for line, e in zip(chosen, made, strict=True))


def test_a_broken_model_says_why_and_costs_the_others_nothing(scored: dict[str, Path]) -> None:
    found = json.loads(scored["broken"].read_text())
    assert found["tasks"] == {} and found["error"].startswith("SafetensorError: ") and "\n" not in found["error"]
    assert json.loads(scored["gone"].read_text())["error"] == "InputError: nowhere holds no model (no config.json)"
    assert json.loads(scored["last"].read_text())["error"] is None


def test_what_is_done_is_not_done_again(
    scored: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def child(todo: list[dict[str, Any]], *_: Any) -> int:
        asked.append([order["name"] for order in todo])
        raise KeyboardInterrupt  # as if stopped at once: nothing is recorded

    monkeypatch.setattr(evaluation, "_run_child", child)
    good = [(name, models[name]) for name in ("first", "last")]
    out = scored["first"].parent
    assert evaluation.evaluate(good, settings(), out) == {name: scored[name] for name, _ in good}
    assert asked == []
    for jobs, changed in (([*good, ("broken", models["broken"])], settings()), (good, settings(limit=5))):
        with pytest.raises(KeyboardInterrupt):
            evaluation.evaluate(jobs, changed, out)
    assert asked == [["broken"], ["first", "last"]]
    assert json.loads(scored["first"].read_text())["error"] is None


def test_batches_padded_on_the_left_change_nothing(
    scored: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    """Prompts of unlike length, one by one and three at a time: the same sentences, the same log-likelihoods."""
    alone = evaluation.evaluate([("first", models["first"])], settings(batch_size=1), tmp_path)["first"]
    one_by_one, together = (samples(file, "records_generation") for file in (alone, scored["first"]))
    assert [line["output"] for line in one_by_one] == [line["output"] for line in together]
    assert len({str(line["output"]) for line in together}) == LIMIT
    for one, other in zip(samples(alone, "records_choice"), samples(scored["first"], "records_choice"), strict=True):
        assert [o[0] for o in one["output"]] == pytest.approx([o[0] for o in other["output"]], rel=1e-4)


def test_the_lm_eval_command_gives_the_same_scores(
    scored: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(TASKS), "--include_path", "eval"]
    command += ["--model_args", f"pretrained={models['first']},dtype=float32", "--device", "cpu", "--batch_size", "3"]
    command += ["--limit", str(LIMIT), "--output_path", str(tmp_path / "out.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    written = next(tmp_path.rglob("*.json"))
    theirs = json.loads(written.read_text())["results"]
    ours = json.loads(scored["first"].read_text())["tasks"]
    for task, metrics in ours.items():
        for metric, value in metrics.items():
            assert theirs[task][f"{metric},none"] == pytest.approx(value)


def test_unknown_task_is_refused_with_the_nearest(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task 'records_generatoin'.*did you mean records_generation"):
        evaluation.evaluate([("first", models["first"])], settings(tasks=("records_generatoin",)), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_no_task_and_no_folder_of_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name at least one"):
        evaluation.evaluate([], settings(tasks=()), tmp_path)
    with pytest.raises(InputError, match="no folder 'evil'"):
        evaluation.evaluate([], settings(include="evil"), tmp_path)


def test_a_model_that_kills_the_process_is_noted_and_the_rest_goes_on(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(todo: list[dict[str, Any]], _settings: Any, _include: Any, out: Path) -> int:
        for order in todo:
            if order["name"] == "broken":
                return -9
            evaluation._write_result(out, evaluation._result(order, tasks={"t": {"m": 1.0}}))
        return 0

    monkeypatch.setattr(evaluation, "_run_child", child)
    files = evaluation.evaluate(list(models.items()), settings(), tmp_path)
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    assert "ended with code -9" in found["broken"]["error"]
    assert [found[name]["error"] for name in ("first", "last")] == [None, None]


def test_fingerprint_follows_contents_and_nothing_else(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["first"], copy)
    before = evaluation._fingerprint("shared", copy)
    assert before == evaluation._fingerprint("shared", models["first"])
    (copy / "llmkd.json").write_text("{}")
    os.utime(copy / "config.json", (1, 1))
    assert evaluation._fingerprint("shared", copy) == before
    assert evaluation._fingerprint("other", copy) != before
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert evaluation._fingerprint("shared", copy) != before


def test_fingerprint_follows_tasks_their_data_and_the_settings(tmp_path: Path) -> None:
    data, task = tmp_path / "rows.json", tmp_path / "tasks" / "t.yaml"
    task.parent.mkdir()
    data.write_text("[]")
    text = f"task: t\nprocess_docs: !function utils.f\ndataset_kwargs: {{data_files: {{test: [{data}]}}}}\n"
    seen = []
    for yaml, rows, limit in ((text, "[]", 4), (text, "[1]", 4), (text + "# more", "[1]", 4), (text, "[]", 5)):
        task.write_text(yaml)
        data.write_text(rows)
        seen.append(evaluation._shared_fingerprint(settings(tasks=("t",), limit=limit), task.parent))
    task.write_text(text)
    assert len(set(seen)) == 4
    data.write_text("[]")
    assert evaluation._shared_fingerprint(settings(tasks=("t",)), task.parent) == seen[0]


def test_fingerprint_follows_the_asked_tasks_and_no_others(tmp_path: Path) -> None:
    """A task's own YAML, what it includes, what a group names, the folder's Python; not its neighbours."""
    (tmp_path / "base.yml.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "one.yaml").write_text("task: one\ninclude: base.yml.yaml\n")
    (tmp_path / "two.yaml").write_text("task: two\n")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    (tmp_path / "utils.py").write_text("")

    def made_of(*tasks: str) -> set[str]:
        return {file.name for file in evaluation._task_files(tmp_path, tasks)}

    assert made_of("two") == {"two.yaml", "utils.py"}
    assert made_of("one") == {"one.yaml", "base.yml.yaml", "utils.py"}
    assert made_of("both") == {"both.yaml", "one.yaml", "two.yaml", "base.yml.yaml", "utils.py"}
    assert made_of("hellaswag") == {"utils.py"}  # lm-eval's own: its version counts


def test_the_child_is_no_rank_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = evaluation._environment()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment.get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    spec = importlib.util.spec_from_file_location("records_task_utils", ROOT / "eval" / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_right_sentence_in_any_phrasing_scores_full_marks(utils: ModuleType) -> None:
    """Also where an item has fewer references than others: none of its own may be lost to the shortest list."""
    rows = list(utils.record_splits(items=80)["test"])
    counts = {len(row["references"]) for row in rows}
    assert len(counts) > 1
    scores = [utils.score_sentences(row, [" " + row["references"][-1]]) for row in rows]
    assert utils.bleu([score["bleu"] for score in scores]) == pytest.approx(100)
    assert utils.chrf([score["chrf"] for score in scores]) == pytest.approx(100)
    assert {score["slots_exact"] for score in scores} == {1.0}
    assert {score["slots"] for score in scores} == {1.0}


def test_a_sentence_of_another_record_scores_less(utils: ModuleType) -> None:
    rows = list(utils.record_splits(items=20)["test"])
    scores = [utils.score_sentences(row, [other["completion"]]) for row, other in zip(rows, rows[1:], strict=False)]
    assert utils.bleu([score["bleu"] for score in scores]) < 60
    assert sum(score["slots_exact"] for score in scores) == 0
    assert 0 < sum(score["slots"] for score in scores) < len(scores)
