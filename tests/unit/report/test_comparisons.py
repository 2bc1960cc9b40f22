"""Who is compared with whom, by which numbers, in which family; and the items behind the numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from llmkd.evaluation import text_metrics
from llmkd.report.comparisons import questions
from llmkd.report.results import Row
from llmkd.report.significance import items_bootstrap
from tests.unit.report.study_folder import Folder

SCORES = {
    "ce_only": (60.0, 61.5, 60.5, 59.0),
    "none": (65.0, 66.5, 64.0, 66.0),
    "forward": (70.0, 72.0, 71.0, 69.5),
    "reverse": (70.3, 71.6, 71.4, 69.6),
    "random": (68.0, 71.0, 69.0, 70.0),
}


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    made = Folder(tmp_path, margins={"say/bleu": 1.0})
    made.score(made.entry("teacher", None, None, "teacher"), 99.0)
    made.score(made.entry("baseline", "undistilled", None, "undistilled"), 3.0)
    made.students(SCORES)
    return made


def rows(**kinds: str) -> list[Row]:
    return [Row(name, kind, models=1, seeds=[]) for name, kind in kinds.items()]


def test_no_pair_is_asked_about_twice() -> None:
    study = rows(
        teacher="teacher",
        undistilled="baseline",
        ce_only="baseline",
        none="student",
        forward="student",
        reverse="student",
    )
    assert questions(study, "forward") == {
        "forward": ["reverse"],
        "none": ["forward", "reverse"],
        "ce_only": ["none", "forward", "reverse"],
        "undistilled": ["none", "forward", "reverse"],
    }
    for reference in ("forward", "reverse", "none", "ce_only"):
        asked = [frozenset((one, base)) for base, others in questions(study, reference).items() for one in others]
        assert len(asked) == len(set(asked))
    assert questions(rows(forward="student", reverse="student"), "random") == {}


def test_comparisons_equal_scipys_and_statsmodels_on_the_files_numbers(study: Folder) -> None:
    found = [c for c in study.results().comparisons if (c.metric, c.reference) == ("say/bleu", "forward")]
    assert [c.strategy for c in found] == ["reverse", "random"]
    base = SCORES["forward"]
    tests = [stats.ttest_rel(SCORES[c.strategy], base) for c in found]
    tosts = [ttost_paired(np.array(SCORES[c.strategy]), np.array(base), -1.0, 1.0)[0] for c in found]
    for c, test in zip(found, tests, strict=True):
        assert c.difference == pytest.approx(np.mean(np.subtract(SCORES[c.strategy], base)))
        assert c.interval == pytest.approx(list(test.confidence_interval(0.95)))
        assert (c.seeds, c.margin) == (4, 1.0)
    assert [c.p_different for c in found] == pytest.approx([test.pvalue for test in tests])
    assert [c.p_equivalent for c in found] == pytest.approx(tosts)
    adjusted = multipletests([test.pvalue for test in tests], method="holm")[1]
    assert [c.p_different_holm for c in found] == pytest.approx(list(np.asarray(adjusted)))
    assert [c.p_equivalent_holm for c in found] == pytest.approx(
        list(np.asarray(multipletests(tosts, method="holm")[1]))
    )
    assert [c.verdict for c in found] == ["equivalent", "undecided"]


def test_the_undistilled_student_is_one_number_for_all_seeds(study: Folder) -> None:
    found = study.comparison("say/bleu", "forward", "undistilled")
    assert found.seeds == 4 and found.difference == pytest.approx(np.mean(SCORES["forward"]) - 3.0)
    assert found.p_different == pytest.approx(stats.ttest_1samp(SCORES["forward"], 3.0)[1])


def test_seeds_are_paired_by_their_number_not_by_their_place(study: Folder) -> None:
    study.score("forward-s0", None, error="no room")
    found = study.comparison("say/bleu", "reverse", "forward")
    test = stats.ttest_rel(SCORES["reverse"][1:], SCORES["forward"][1:])
    assert found.seeds == 3 and found.p_different == pytest.approx(test.pvalue)


def test_without_a_margin_nothing_is_equivalent(study: Folder) -> None:
    found = [c for c in study.results().comparisons if c.metric == "choose/acc"]
    assert found and all((c.margin, c.p_equivalent, c.p_equivalent_holm) == (None, None, None) for c in found)
    assert {c.verdict for c in found} == {"not tested"}  # every model has 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Items


def test_lm_evals_items_are_drawn_anew(study: Folder) -> None:
    rng, items = np.random.default_rng(0), 40
    answers = {}
    for strategy in ("forward", "reverse"):
        for seed in range(4):
            right = (rng.uniform(size=items) < (0.9 if strategy == "forward" else 0.4)).astype(int)
            answers[strategy, seed] = right
            study.score(f"{strategy}-s{seed}", 1.0, float(right.mean()))
            lines = [{"task": "choose", "item": n, "metrics": {"acc": int(value)}} for n, value in enumerate(right)]
            study.lines(f"evaluations/{strategy}-s{seed}.samples.jsonl", lines)
    found = study.comparison("choose/acc", "reverse", "forward")
    one, other = (
        np.stack([[[value, 1.0] for value in answers[strategy, seed]] for seed in range(4)])
        for strategy in ("reverse", "forward")
    )
    expected = items_bootstrap(one, other)
    assert expected is not None and expected.difference == pytest.approx(found.difference)
    assert (found.items, found.items_p) == (items, expected.p)
    assert found.items_interval == pytest.approx(list(expected.interval))
    assert found.items_p_holm == found.items_p and expected.p < 0.01  # the only member of its family that has items


TEXTS = [
    "The inn serves Thai food.",
    "A cheap inn by the lake.",
    "It takes dogs and is near Selby.",
    "Heron Mill is an inn.",
]


def generated(study: Folder, strategy: str, texts: list[list[str]]) -> None:
    """Texts of each seed, with the metrics that they have."""
    for seed, written in enumerate(texts):
        name = study.entry("student", strategy, seed, steps=("generation",))
        corpus = [(text, [reference]) for text, reference in zip(written, TEXTS, strict=True)]
        metrics, scores = text_metrics.corpus_metrics(corpus, [True] * len(corpus))
        study.generated(name, metrics)
        rows = [
            {"item": n, "prompt": "p", "references": references, "text": text, "scores": scores[n]}
            for n, (text, references) in enumerate(corpus)
        ]
        study.lines(f"generations/{name}.jsonl", rows)


def test_corpus_bleu_is_scored_anew_for_each_draw(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    generated(study, "forward", [TEXTS, TEXTS[:3] + ["Heron Mill is a farm."]])
    generated(study, "reverse", [["The inn serves food."] + TEXTS[1:], ["An inn.", *TEXTS[1:3], "Heron Mill is big."]])
    found = study.comparison("generation/bleu", "reverse", "forward")
    assert found.items == 4 and found.items_interval is not None
    assert found.items_interval[0] <= found.difference <= found.items_interval[1]

    files = [study.folder / f"generations/{s}-s{seed}.jsonl" for s in ("reverse", "forward") for seed in (0, 1)]
    models = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    draws = np.random.default_rng(0).integers(0, 4, (2000, 4))

    def bleu(model: list[Any], draw: Any) -> float:
        return text_metrics.bleu([(model[n]["text"], model[n]["references"]) for n in draw])

    drawn = [
        np.mean([bleu(m, draw) for m in models[:2]]) - np.mean([bleu(m, draw) for m in models[2:]])
        for draw in draws[:200]
    ]
    some = items_bootstrap(
        *(
            np.stack([[text_metrics.bleu.statistics(x["text"], x["references"]) for x in m] for m in half])
            for half in (models[:2], models[2:])
        ),
        score=lambda sums: np.apply_along_axis(text_metrics.bleu.of, -1, np.rint(sums).astype(int)),
        resamples=200,
    )
    assert some is not None and some.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    metrics = {c.metric for c in study.results().comparisons if c.items}
    assert metrics == {"generation/bleu", "generation/chrf", "generation/rouge_l", "generation/repetition"}


def test_draws_of_items_leave_out_thoughts_as_the_scores_do(tmp_path: Path) -> None:
    found = []
    for begins in ("", "<think>\n\n</think>\n\n"):
        study = Folder(tmp_path / str(bool(begins)))
        for strategy, last in (("forward", "Heron Mill is an inn."), ("reverse", "Heron Mill is a farm.")):
            generated(study, strategy, [[*TEXTS[:3], last]] * 2)
            for file in (study.folder / "generations").glob("*.jsonl"):
                file.write_text(file.read_text().replace('"text": "', '"text": ' + json.dumps(begins)[:-1]))
        found.append(study.comparison("generation/bleu", "reverse", "forward"))
    assert found[0] == found[1] and found[0].items == 4


def test_agreement_is_a_mean_over_tokens_where_that_gives_the_reported_number(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    for strategy, shift in (("forward", 0.0), ("reverse", 1.0)):
        for seed in (0, 1):
            name = study.entry("student", strategy, seed, steps=("agreement",))
            lines = [{"item": n, "kl": n + shift + seed, "top1": n / 4, "tokens": n + 1} for n in range(4)]
            by_tokens = np.average([line["kl"] for line in lines], weights=[1, 2, 3, 4])
            metrics = {"kl": float(by_tokens), "top1": 0.375, "likelihood": -1.0}
            study.write(f"agreement/{name}.json", {"name": name, "error": None, "metrics": metrics, "rows": 4})
            study.lines(f"agreement/{name}.jsonl", lines)
    found = {c.metric: c for c in study.results().comparisons}
    assert found["agreement/kl"].items_interval == pytest.approx([1.0, 1.0])  # the same shift for every item
    assert found["agreement/top1"].items == 4 and found["agreement/likelihood"].items is None


@pytest.mark.parametrize("spoilt", ["another number", "an item less", "no file"])
def test_items_that_do_not_give_the_reported_number_say_nothing(tmp_path: Path, spoilt: str) -> None:
    study = Folder(tmp_path)
    generated(study, "forward", [TEXTS, TEXTS])
    generated(study, "reverse", [TEXTS, TEXTS[:3] + ["Heron Mill is a farm."]])
    assert study.comparison("generation/bleu", "reverse", "forward").items == 4
    file = study.folder / "generations/reverse-s1"
    if spoilt == "another number":
        study.generated("reverse-s1", {"bleu": 12.0})
    elif spoilt == "an item less":
        lines = file.with_suffix(".jsonl").read_text().splitlines(True)
        file.with_suffix(".jsonl").write_text("".join(lines[:3]))
    else:
        file.with_suffix(".jsonl").unlink()
    found = study.comparison("generation/bleu", "reverse", "forward")
    assert (found.items, found.items_interval, found.items_p, found.items_p_holm) == (None,) * 4
