"""Agreement with the teacher, held against whole logits in float64, on tiny random models and made-up texts."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmkd.data.tokens import leading
from llmkd.errors import InputError
from llmkd.evaluation import agreement
from llmkd.evaluation.results import GeneratedText
from llmkd.files import write_text
from llmkd.models import make
from llmkd.models.load import load_config, load_tokenizer
from llmkd.recipe.recipe import Data, Evaluation
from tests.in_process import in_process, stopped_at_once

ITEMS, ROWS = 7, 5  # more generated texts than compared rows


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models (the teacher, its copy, one with a wider head, one with cut weights, one of another tokenizer) and texts of them."""
    made = tmp_path_factory.mktemp("agreement")
    teacher, tokenizer = tiny / "teacher", load_tokenizer(tiny / "teacher")
    shutil.copytree(teacher, made / "same")
    config = load_config(teacher)
    config.update({"vocab_size": 328, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    make.new_model(config, made / "wider", seed=5, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    shutil.copytree(made / "wider", made / "broken")
    weights = made / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    other = make.new_tokenizer(["quite another text, with words of its own"], 320)
    make.new_model(config, made / "foreign", seed=5, dtype=torch.float32, tokenizer=other.save_pretrained)
    (made / "generations").mkdir()
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    draw = random.Random(1)
    for name in ("teacher", "wider", "broken", "foreign"):
        texts = [[draw.randrange(2, 320) for _ in range(draw.randrange(0, 6))] for _ in range(ITEMS)]
        texts[3] = [5, 6, 7, 8][: 4 if name == "teacher" else 3]  # the shorter agrees as far as it goes
        texts[4] = []
        lines = [{"item": i, "prompt": rows[i]["prompt"], "token_ids": ids} for i, ids in enumerate(texts)]
        write_text(made / "generations" / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(made / "generations" / "teacher.jsonl", made / "generations" / "same.jsonl")
    return made


def with_added(model: Path, folder: Path) -> int:
    """A copy of a model whose tokenizer has one more token, <tool>; its id."""
    shutil.copytree(model, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    return tokenizer.convert_tokens_to_ids("<tool>")


def settings(source: Path, **changes: Any) -> Evaluation:
    values = {
        "agreement_rows": ROWS,
        "generation": {"source": str(source), "items": ITEMS, "split": "train"},
        "batch_size": 2,
    }
    return Evaluation.model_validate({**values, **changes})


def run(folder: Path, tiny: Path, names: list[str], out: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    jobs = [(name, folder / name) for name in names]
    data, asked = Data(source="records", rows=1, max_length=64), settings(tiny / "rows.jsonl", **changes)
    files = agreement.agree(jobs, tiny / "teacher", asked, data, folder / "generations", out)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


@pytest.fixture(scope="module")
def found(folder: Path, tiny: Path) -> dict[str, dict[str, Any]]:
    return run(folder, tiny, ["same", "broken", "silent", "foreign", "wider"], folder / "agreement")


@pytest.fixture(scope="module", autouse=True)
def _silent(folder: Path) -> None:
    """A model that wrote no texts."""
    shutil.copytree(folder / "wider", folder / "silent")


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "agreement" / f"{name}.jsonl").read_text().splitlines()]


def log_p(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] in float64, log-probabilities of the next token at each position."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_numbers_are_those_of_whole_logits(found: dict[str, dict[str, Any]], folder: Path, tiny: Path) -> None:
    """KL and top-1 over the shared columns at the completion's tokens and its end; likelihood of the student's text."""
    load: Any = AutoModelForCausalLM.from_pretrained
    teacher, student = load(tiny / "teacher").double(), load(folder / "wider").double()
    tokenizer = load_tokenizer(tiny / "teacher")
    kl, same = [], []
    for number, row in enumerate(map(json.loads, (tiny / "rows.jsonl").read_text().splitlines()[:ROWS])):
        prompt, completion = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in row)
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        with torch.no_grad():
            p, q = (
                model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1, :320].log_softmax(-1)
                for model in (teacher, student)
            )
        per_token = (p.exp() * (p - q)).sum(-1)
        line = lines(folder, "wider")[number]
        assert (line["item"], line["tokens"]) == (number, len(completion) + 1)
        assert line["kl"] == pytest.approx(per_token.mean().item(), rel=1e-4)
        assert line["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
        kl.append(per_token)
        same.append(p.argmax(-1) == q.argmax(-1))
    metrics, result = found["wider"]["metrics"], found["wider"]
    assert metrics["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4) and metrics["kl"] > 0.1
    assert metrics["top1"] == pytest.approx(torch.cat(same).double().mean().item()) and metrics["top1"] < 1
    assert (result["rows"], result["tokens"], result["error"]) == (ROWS, len(torch.cat(kl)), None)

    texts = [json.loads(line) for line in (folder / "generations" / "wider.jsonl").read_text().splitlines()]
    total, count = 0.0, 0
    for text, line in zip(texts, lines(folder, "wider"), strict=True):
        prompt, ids = leading(tokenizer, [text["prompt"]])[0], text["token_ids"]
        after = log_p(teacher, [*prompt, *ids])[len(prompt) - 1 : -1]
        score = sum(after[place, token].item() for place, token in enumerate(ids))
        assert line["likelihood"] == (pytest.approx(score / len(ids), rel=1e-4) if ids else None)
        total, count = total + score, count + len(ids)
    assert metrics["likelihood"] == pytest.approx(total / count, rel=1e-4)


def test_the_teacher_reads_a_text_once_whoever_wrote_it(
    found: dict[str, dict[str, Any]], folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    for name in ("wider", "twin"):
        shutil.copytree(folder / "wider", tmp_path / name)
    shutil.copytree(folder / "generations", tmp_path / "generations")
    shutil.copy(folder / "generations" / "wider.jsonl", tmp_path / "generations" / "twin.jsonl")
    read: list[list[tuple[list[int], list[int]]]] = []
    real = agreement.text_likelihoods

    def noted(model: Any, texts: dict[int, tuple[list[int], list[int]]], **how: Any) -> dict[int, float]:
        read.append(list(texts.values()))
        return real(model, texts, **how)

    monkeypatch.setattr(agreement, "text_likelihoods", noted)
    together = run(tmp_path, tiny, ["wider", "twin"], tmp_path / "agreement")
    for name in ("wider", "twin"):
        assert together[name]["metrics"]["likelihood"] == pytest.approx(found["wider"]["metrics"]["likelihood"])
    assert all(len(texts) == ITEMS for texts in read)


def test_the_teacher_agrees_with_itself(found: dict[str, dict[str, Any]], folder: Path) -> None:
    metrics = found["same"]["metrics"]
    assert (metrics["kl"], metrics["top1"], metrics["token_agreement"]) == (0.0, 1.0, 1.0)
    assert {(line["token_agreement"], line.get("kl")) for line in lines(folder, "same")} == {(1.0, 0.0), (1.0, None)}


def test_token_agreement_is_over_the_longer_text(found: dict[str, dict[str, Any]], folder: Path) -> None:
    shares = [line["token_agreement"] for line in lines(folder, "wider")]
    assert shares[3:5] == [0.75, 1.0]
    assert found["wider"]["metrics"]["token_agreement"] == pytest.approx(sum(shares) / ITEMS)
    assert (
        agreement.token_agreement([1, 2, 3], [1, 5, 3, 4]) == agreement.token_agreement([1, 5, 3, 4], [1, 2, 3]) == 0.5
    )
    assert agreement.token_agreement([], [1]) == 0.0


def test_a_failure_marks_its_model_and_no_other(found: dict[str, dict[str, Any]]) -> None:
    assert "broken" in found["broken"]["error"] or "Safetensor" in found["broken"]["error"]
    assert "tokenizers differ, first at token" in found["foreign"]["error"]
    for name in ("broken", "foreign"):
        assert set(found[name]["metrics"].values()) == {None}
    silent = found["silent"]
    assert silent["error"].startswith("no texts of silent in ")
    assert silent["metrics"] == {**found["wider"]["metrics"], "token_agreement": None, "likelihood": None}


def test_a_student_with_added_tokens_is_compared_where_no_text_holds_one(
    found: dict[str, dict[str, Any]], folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are those of another student, and so are its numbers, until it writes the token that its teacher lacks."""
    in_process(monkeypatch)
    token = with_added(folder / "wider", tmp_path / "added")
    texts = [json.loads(line) for line in (folder / "generations" / "wider.jsonl").read_text().splitlines()]
    assert not any(token in text["token_ids"] for text in texts)
    generations = Path(shutil.copytree(folder / "generations", tmp_path / "generations"))
    shutil.copy(generations / "wider.jsonl", generations / "added.jsonl")
    texts[2]["token_ids"] = [5, token]
    write_text(generations / "spoken.jsonl", "".join(json.dumps(text) + "\n" for text in texts))
    jobs = [(name, tmp_path / "added") for name in ("added", "spoken")]
    data, asked = Data(source="records", rows=1, max_length=64), settings(tiny / "rows.jsonl")
    files = agreement.agree(jobs, tiny / "teacher", asked, data, generations, tmp_path / "out")
    added, spoken = (json.loads(files[name].read_text()) for name, _ in jobs)
    assert added["error"] is None and added["metrics"] == found["wider"]["metrics"]
    assert spoken["error"].startswith(f"spoken's text of item 2: token '<tool>' (id {token}) is in only one of the")
    assert set(spoken["metrics"].values()) == {None}


def test_a_teacher_with_added_tokens_is_compared_where_no_row_holds_one(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    token = with_added(folder / "wider", tmp_path / "teacher")
    first, *rows = (tiny / "rows.jsonl").read_text().splitlines()[:ITEMS]
    values, results = json.loads(first), {}
    for name, completion in (("plain", values["completion"]), ("tools", values["completion"] + " <tool>")):
        source = tmp_path / f"{name}.jsonl"
        source.write_text("\n".join([json.dumps({**values, "completion": completion}), *rows]))
        jobs, data = [("wider", folder / "wider")], Data(source="records", rows=1, max_length=64)
        out = tmp_path / name
        files = agreement.agree(jobs, tmp_path / "teacher", settings(source), data, folder / "generations", out)
        results[name] = json.loads(files["wider"].read_text())
    assert results["plain"]["error"] is None
    assert (results["plain"]["metrics"]["kl"], results["plain"]["metrics"]["top1"]) == (0.0, 1.0)  # the same weights
    assert results["tools"]["error"].startswith(
        f"a row of evaluation.generation: token '<tool>' (id {token}) is in only one of the teacher's and the student's"
    )
    assert set(results["tools"]["metrics"].values()) == {None}


def test_texts_of_rows_that_are_no_longer_asked_for_are_refused() -> None:
    texts = {item: GeneratedText(item=item, token_ids=[1]) for item in (0, 4)}
    agreement.check_items(texts, 5, Path("generations/s.jsonl"))
    agreement.check_items({}, 0, Path("generations/s.jsonl"))
    with pytest.raises(
        InputError,
        match=r"^generations/s\.jsonl: a text of row 4, but evaluation\.generation asks for 3 rows now; run ",
    ):
        agreement.check_items(texts, 3, Path("generations/s.jsonl"))


def test_what_is_done_is_not_done_again_and_what_failed_is(
    found: dict[str, dict[str, Any]], folder: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stopped_at_once(monkeypatch)
    assert run(folder, tiny, ["same", "wider"], folder / "agreement")["wider"] == found["wider"]
    for names, changes in ((["same", "broken", "wider"], {}), (["same"], {"agreement_rows": 4})):
        with pytest.raises(KeyboardInterrupt):
            run(folder, tiny, names, folder / "agreement", **changes)
    assert asked == ["broken", "same"]


def test_rows_that_are_not_asked_for_or_not_there_are_refused(
    folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    with pytest.raises(InputError, match="agreement_rows: no rows to compare on"):
        run(folder, tiny, ["same"], tmp_path, agreement_rows=0)
    with pytest.raises(InputError, match="no file or folder './none.jsonl'"):
        run(folder, tiny, ["same"], tmp_path, generation={"source": "./none.jsonl", "split": "train"})
