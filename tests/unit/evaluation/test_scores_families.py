"""How models of other families than decoders are scored: classified rows, answered prompts, and what is refused in their place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from llmkd import starting
from llmkd.errors import InputError
from llmkd.evaluation import agreement, class_metrics, classification, generation, places
from llmkd.evaluation.classification import classify
from llmkd.evaluation.held_out import Prompt, batches_of, check_evaluation, encoded, held_out_data
from llmkd.evaluation.results import AgreementResult, ClassificationResult, LmEvalResult
from llmkd.inference import backends
from llmkd.models import load
from llmkd.models.families import family
from llmkd.recipe.evaluation import Generation
from llmkd.recipe.recipe import Data, Evaluation
from llmkd.recipe.study_entries import StudyEntry
from llmkd.report.comparisons import ItemScores
from tests.family_models import CLASSES, ENCODER_DECODERS, ENCODERS, family_recipe, new
from tests.in_process import in_process

Pairs = list[tuple[int, int]]


def plain_f1(pairs: Pairs, name: int) -> float:
    """F1 of one class from precision and recall."""
    right = sum(y == p == name for y, p in pairs)
    predicted, there = sum(p == name for _, p in pairs), sum(y == name for y, _ in pairs)
    if right == 0:
        return 0.0
    precision, recall = right / predicted, right / there
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("classes", [2, 3])
def test_f1_is_made_of_precision_and_recall_and_of_sums_over_items(classes: int) -> None:
    draw = np.random.default_rng(0)
    pairs: Pairs = [(int(y), int(p)) for y, p in draw.integers(0, classes, (40, 2))]
    labels, predicted = zip(*pairs, strict=True)
    found = class_metrics.class_metrics(labels, predicted, [1.0] * 40, classes)
    each = [plain_f1(pairs, name) for name in range(classes)]
    assert found["f1"] == pytest.approx(sum(each) / classes, rel=1e-12)
    assert ("f1_second" in found) == (classes == 2)
    if classes == 2:
        assert found["f1_second"] == pytest.approx(each[1], rel=1e-12)
    assert found["accuracy"] == sum(y == p for y, p in pairs) / 40
    rows = np.stack([class_metrics.class_statistics(y, p, classes) for y, p in pairs])
    drawn = draw.integers(0, 40, (5, 40))
    scores = class_metrics.macro_f1(rows[drawn].sum(1))
    for sample, score in zip(drawn, scores, strict=True):
        again = [plain_f1([pairs[i] for i in sample], name) for name in range(classes)]
        assert score == pytest.approx(sum(again) / classes, rel=1e-12)
    assert class_metrics.macro_f1(np.zeros(3 * classes)) == 0.0


def test_a_class_that_nobody_named_is_not_among_the_classes() -> None:
    found = class_metrics.class_metrics([0, 0], [0, 0], [0.1, 0.3], 2)
    assert found == {"accuracy": 1.0, "f1": 1.0, "f1_second": 0.0, "cross_entropy": pytest.approx(0.2)}
    # labels that count from 1 leave class 0 empty
    from_one = class_metrics.class_metrics([1, 2, 2, 1], [1, 2, 1, 1], [1.0] * 4, 3)
    assert from_one["f1"] == class_metrics.class_metrics([0, 1, 1, 0], [0, 1, 0, 0], [1.0] * 4, 2)["f1"]


def test_classify_gives_the_scores_of_the_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, without padding, for every type of encoder; what was done is not done again."""
    recipes = {}
    for name in ENCODERS:
        (tmp_path / name).mkdir()
        recipes[name] = family_recipe(tmp_path / name, "encoder", new(ENCODERS[name](2), "encoder"))
    settings, data = Evaluation(batch_size=7), recipes["bert"].data
    out = tmp_path / "classifications"
    jobs = [(name, tmp_path / name / "teacher") for name in ENCODERS]
    monkeypatch.setattr(places, "visible_devices", lambda: ["0", "1"])  # pretended: there is no GPU here,
    monkeypatch.setattr(
        starting, "READ_LATE", (*starting.READ_LATE, "CUDA_VISIBLE_DEVICES")
    )  # so that processes may be forked
    files = classify([*jobs, ("gone", tmp_path / "nowhere")], settings, data, out)
    for name in ENCODERS:
        _check_scores(tmp_path / name, files[name])
    failed = json.loads(files["gone"].read_text())
    assert "holds no model (no config.json)" in failed["error"] and failed["metrics"]["accuracy"] is None
    before = files["bert"].stat().st_mtime_ns
    classify(jobs, settings, data, out)
    assert files["bert"].stat().st_mtime_ns == before


def _check_scores(folder: Path, file: Path) -> None:
    model = CLASSES["encoder"].from_pretrained(folder / "teacher").eval()
    tokenizer = load.load_tokenizer(folder / "teacher")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == len(rows) == 40
    labels, predicted, nats = [], [], []
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0]
        labels.append(["first", "second", "third"].index(row["label"]))
        predicted.append(int(logits.argmax()))
        nats.append(-logits.double().log_softmax(-1)[labels[-1]].item())
        assert (line["item"], line["label"], line["predicted"]) == (number, labels[-1], predicted[-1])
    found = json.loads(file.read_text())
    expected = class_metrics.class_metrics(labels, predicted, nats, 3)
    assert found["metrics"] == pytest.approx(expected, rel=1e-5) and found["error"] is None
    assert len(set(predicted)) > 1
    about: dict[str, Any] = {"kind": "student", "strategy": "forward", "seed": 0, "model": "", "train": None}
    entry = StudyEntry(name="one", **about, results={"classification": file.name})
    scores = {f"classification/{key}": value for key, value in found["metrics"].items()}
    items = ItemScores(file.parent, [entry], {"one": scores}, {"one": []})
    for metric in ("accuracy", "f1", "cross_entropy"):
        sums = items.of(f"classification/{metric}", [("forward", 0)], [("forward", 0)])
        assert sums is not None and sums[2](sums[0][0].sum(0)) == pytest.approx(found["metrics"][metric], rel=1e-4)


def test_a_label_that_the_model_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    recipe = family_recipe(tmp_path, "encoder", new(ENCODERS["bert"](2), "encoder"))
    rows = Dataset.from_list([{"text": "red", "label": "fourth"}])
    sentence = "data row 0: the label 'fourth' is none of the model's classes (first, second, third); fix the row, or leave it out"
    with pytest.raises(InputError, match=re.escape(sentence)):
        model = ClassificationResult(model=str(tmp_path / "teacher"))
        classification.score(model, rows, classification.Task(Evaluation(), recipe.data))


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_answers_are_the_likeliest_tokens_one_after_another(tmp_path: Path, name: str) -> None:
    """Prompts of different lengths together, against one prompt and one token at a time by the plain model."""
    family_recipe(tmp_path, "encoder_decoder", new(ENCODER_DECODERS[name](2, 2), "encoder_decoder"))
    folder = tmp_path / "teacher"
    model, tokenizer = CLASSES["encoder_decoder"].from_pretrained(folder).eval(), load.load_tokenizer(folder)
    items = [Prompt(text=text, references=["x"]) for text in ("red", "blue green house tree", "old new")]
    asked = encoded(items, tokenizer, "encoder_decoder")
    assert [ids[-1] for _, ids in asked] == [tokenizer.eos_token_id] * 3
    how = backends.Sampling(max_new_tokens=8, stops=backends.stop_ids(folder, tokenizer))
    made = backends.by_hugging_face(folder, [ids for _, ids in asked], "float32", how)
    for (_, ids), text in zip(asked, made.token_ids, strict=True):
        decoder = [family(model.config).start]
        while len(decoder) <= 8 and (len(decoder) == 1 or decoder[-1] not in how.stops):
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder])).logits
            decoder.append(int(logits[0, -1].argmax()))
        assert text == decoder[1:]


def test_generation_runs_an_encoder_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    recipe = family_recipe(tmp_path, "encoder_decoder", new(ENCODER_DECODERS["t5"](2, 2), "encoder_decoder"))
    rows = str(tmp_path / "rows.jsonl")
    settings = Evaluation(generation=Generation(source=rows, items=4, max_new_tokens=5))
    jobs = [("one", tmp_path / "teacher")]
    files = generation.generate(jobs, settings, Data(source="records", rows=1), tmp_path / "out")
    found = json.loads(files["one"].read_text())
    assert found["error"] is None and found["backend"] == "hf" and found["items"] == 4
    assert "vLLM does not run an encoder-decoder" in found["why"]
    assert recipe.teacher_path == str(tmp_path / "teacher")


def test_what_encoders_are_not_asked(tmp_path: Path) -> None:
    base = family_recipe(tmp_path, "encoder", new(ENCODERS["bert"](2), "encoder"))
    held_out = {"evaluation.classification.source": str(tmp_path / "other.jsonl")}
    check_evaluation(base.changed(held_out), "encoder")
    for changes, kind, sentence in (
        ({"evaluation.tasks": ["piqa"]}, "encoder", r"evaluation\.tasks: lm-eval .* an encoder; leave tasks out and"),
        ({"evaluation.generation": {}}, "encoder", r"evaluation\.generation: an encoder writes no texts; leave it out"),
        ({"evaluation.classification": {}}, "encoder", r"classification\.source: the students are trained on all of"),
        ({"evaluation.classification.split": "train"}, "encoder", r"classification\.split: .*'train'.* held out"),
        (held_out, "decoder", r"evaluation\.classification: only an encoder has classes, not a decoder; leave it out"),
        (
            {"evaluation.generation.backend": "vllm"},
            "encoder_decoder",
            r"evaluation\.generation\.backend: vLLM does not run an encoder-decoder here; write hf",
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            check_evaluation(base.changed(changes), kind)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="an encoder where a causal language model is needed; give a decoder"):
        load.load_causal_lm(tmp_path / "teacher", dtype=torch.float32, ds_config=None, attention="auto")


def test_lm_eval_refuses_an_encoder(tmp_path: Path) -> None:
    from llmkd.evaluation.lm_eval_worker import Task, _load

    family_recipe(tmp_path, "encoder", new(ENCODERS["bert"](2), "encoder"))
    model, task = LmEvalResult(model=str(tmp_path / "teacher"), backend="hf"), Task(Evaluation(), None, False)
    with pytest.raises(InputError, match=r"lm-eval is run on decoders alone; score this model by evaluation\.class"):
        _load(model, task, 1)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@torch.no_grad()
def test_agreement_of_encoder_decoders_is_that_of_their_logits(tmp_path: Path, name: str) -> None:
    """KL and top-1 at the completion's tokens, and what the teacher thinks of the student's texts, by the plain models row by row."""
    recipe = family_recipe(tmp_path, "encoder_decoder", new(ENCODER_DECODERS[name](2, 2), "encoder_decoder"))
    new(ENCODER_DECODERS[name](2, 1), "encoder_decoder", seed=1).save_pretrained(tmp_path / "student")
    rows = str(tmp_path / "rows.jsonl")
    settings = Evaluation(generation=Generation(source=rows, items=3), agreement_rows=5, batch_size=2)
    texts = {0: [5, 6, 7], 2: [9]}
    lines = [
        {"item": item, "prompt": "", "references": [], "text": "", "token_ids": ids} for item, ids in texts.items()
    ]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = load.load_tokenizer(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "student")
    task = agreement.Task(tmp_path / "teacher", settings, recipe.data, tmp_path, ["one"], False)
    assert settings.generation is not None
    data = held_out_data(settings.generation, recipe.data, 5)
    outputs = agreement.run_teacher(task, *batches_of(data, task.teacher, settings, False))
    student_result = AgreementResult(name="one", model=str(tmp_path / "student"))
    result, compared = agreement.compare_model(student_result, task, outputs)
    teacher, student = (CLASSES["encoder_decoder"].from_pretrained(tmp_path / n).eval() for n in ("teacher", "student"))
    start = family(teacher.config).start
    read = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    rows_compared = [line for line in compared if line.kl is not None]
    for line in rows_compared:
        source, target = (tokenizer(read[line.item][key])["input_ids"] for key in ("prompt", "completion"))
        asked = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[start, *target[:-1]]])}
        p, q = (model(**asked).logits[0].double().log_softmax(-1) for model in (teacher, student))
        assert line.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
        assert line.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert len(rows_compared) == result.rows == 5 and result.error is not None  # the teacher wrote no texts
    for item, ids in texts.items():
        source = tokenizer(read[item]["prompt"])["input_ids"]
        logits = teacher(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[start, *ids[:-1]]])).logits[
            0
        ]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
        assert outputs.likelihoods["one"][item] == pytest.approx(expected, rel=1e-4)


def test_scores_are_the_same_on_one_device_and_on_four(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, and the agreement with the teacher, by processes of which each is given a device, pretended here."""
    monkeypatch.setattr(
        starting, "READ_LATE", (*starting.READ_LATE, "CUDA_VISIBLE_DEVICES")
    )  # so that they may be forked
    models = [
        (name, tiny / folder)
        for name, folder in (("teacher", "teacher"), ("a", "tied"), ("b", "tied"), ("c", "teacher"))
    ]
    rows = str(tiny / "rows.jsonl")
    asked = Generation(source=rows, items=4, max_new_tokens=5, backend="hf", batch_size=3)
    settings, data = Evaluation(generation=asked, agreement_rows=5), Data(source=rows, max_length=64)
    scored: list[dict[str, Any]] = []
    for devices in (["0"], ["0", "1", "2", "3"]):
        monkeypatch.setattr(places, "visible_devices", lambda devices=devices: devices)
        out = tmp_path / str(len(devices))
        generation.generate(models, settings, data, out / "generations")
        agreement.agree(models[1:], tiny / "teacher", settings, data, out / "generations", out / "agreement")
        files = sorted(file for file in out.rglob("*.json*"))
        values = {
            str(file.relative_to(out)): [json.loads(line) for line in file.read_text().splitlines()]
            for file in files
            if file.suffix == ".jsonl"
        }
        results = {str(file.relative_to(out)): json.loads(file.read_text()) for file in files if file.suffix == ".json"}
        assert all(result["error"] is None and result["dtype"] == "float32" for result in results.values())
        scored.append(values | {name: result["metrics"] for name, result in results.items()})
    assert scored[0] == scored[1] and len(scored[0]) == 2 * (4 + 3)
    assert len({json.dumps(scored[0][f"generations/{name}.jsonl"]) for name in ("teacher", "a")}) == 2
