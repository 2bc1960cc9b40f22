"""The answer in one sentence: every case of it, from a study's files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmkd.report.write import report
from tests.unit.report.study_folder import Folder

BASE = (70.0, 72.0, 71.0, 69.0, 73.0)
NEAR = (70.1, 71.9, 71.1, 69.0, 73.05)  # within 0.1 of BASE, seed by seed
FAR = (60.2, 62.1, 60.9, 59.3, 62.8)  # 10 below it
NOISY = (75.0, 66.0, 74.0, 65.0, 74.0)
A_LITTLE = (70.21, 72.19, 71.2, 69.22, 73.18)  # 0.2 above it, at every seed
MARGIN = {"say/bleu": 0.5}


def said(folder: Path, scores: Mapping[str, Sequence[float | None]], **study: Any) -> str:
    made = Folder(folder, **study)
    made.students(scores)
    return made.results().conclusion


def test_equivalent_and_better_than_none(tmp_path: Path) -> None:
    scores = {"none": FAR, "forward": BASE, "reverse": NEAR, "all_to_one": NEAR[:4] + (73.1,)}
    assert said(tmp_path, scores, margins=MARGIN) == (
        "Over 5 seeds, no strategy differs from forward by more than the margin of 0.5 say/bleu; all beat none."
    )


def test_all_baselines_share_a_clause_where_they_share_the_outcome(tmp_path: Path) -> None:
    study = Folder(tmp_path, margins=MARGIN)
    study.score(study.entry("baseline", "undistilled", None, "undistilled"), 3.0)
    study.students({"ce_only": FAR, "none": [value + 5.0 for value in FAR], "forward": BASE, "reverse": NEAR})
    assert study.results().conclusion == (
        "Over 5 seeds, reverse does not differ from forward by more than the margin of 0.5 say/bleu; all beat none and undistilled; "
        "against ce_only, forward and reverse are better, none is not tested."
    )


def test_some_are_apart_some_equal_some_undecided(tmp_path: Path) -> None:
    scores = {"none": FAR, "forward": BASE, "reverse": FAR, "all_to_one": NEAR, "random": NOISY}
    sentence = said(tmp_path, scores, margins=MARGIN)
    assert sentence.startswith(
        "Over 5 seeds, all_to_one does not differ from forward by more than the margin of 0.5 say/bleu; "
        "reverse is worse than forward by 9.94 say/bleu (95 % interval "
    )
    assert "; it is undecided whether random differs from forward by more than the margin of 0.5 say/bleu" in sentence


@pytest.mark.parametrize(
    ("higher", "word", "beside"), [(True, "better", "all beat none"), (False, "worse", "against none, all are worse")]
)
def test_better_is_said_by_the_metrics_own_direction(tmp_path: Path, higher: bool, word: str, beside: str) -> None:
    study = Folder(tmp_path)
    for strategy, values in {"none": FAR, "forward": BASE, "reverse": [value + 5 for value in NEAR]}.items():
        for seed, value in enumerate(values):
            name = study.entry("student", strategy, seed)
            study.score(name, value, higher_is_better={"say": {"bleu": higher}})
    sentence = study.results().conclusion
    assert f"reverse is {word} than forward by 5.03 say/bleu (95 % interval 4.93 to 5.13)" in sentence
    assert sentence.endswith(f"; {beside}.")


def test_a_difference_inside_the_margin_is_said_as_both(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": FAR, "forward": BASE, "reverse": A_LITTLE}, margins=MARGIN)
    assert sentence == (
        "Over 5 seeds, reverse does not differ from forward by more than the margin of 0.5 say/bleu "
        "(a smaller difference is shown for reverse); all beat none."
    )


def test_all_within_noise(tmp_path: Path) -> None:
    other = (66.0, 75.0, 68.0, 74.0, 70.0)
    sentence = said(tmp_path, {"none": NOISY, "forward": BASE, "reverse": other, "random": NOISY[::-1]}, margins=MARGIN)
    assert sentence == (
        "Over 5 seeds, it is undecided whether any strategy differs from forward by more than the margin of 0.5 say/bleu; "
        "no difference from none is shown."
    )


def test_without_a_margin_no_difference_is_not_called_equality(tmp_path: Path) -> None:
    assert said(tmp_path, {"none": FAR, "forward": BASE, "reverse": NEAR, "random": NOISY}) == (
        "Over 5 seeds, no difference in say/bleu from forward is shown for any strategy (no margin was stated, so equality was not "
        "tested); all beat none."
    )


def test_one_seed_concludes_nothing(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": FAR[:1], "forward": BASE[:1], "reverse": BASE[1:2]}, margins=MARGIN)
    assert sentence == "With one seed nothing can be concluded about strategies."


def test_one_seed_scored_of_several_concludes_nothing_either(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": (60.0, None), "forward": (70.0, None), "reverse": (71.0, None)})
    assert sentence == "So far (3 of 6 models scored), with one seed nothing can be concluded about strategies."


def test_a_partial_study_says_so_and_names_what_is_not_there(tmp_path: Path) -> None:
    scores = {"none": FAR, "forward": BASE, "reverse": (*NEAR[:4], None), "random": [None] * 5}
    sentence = said(tmp_path, scores, margins=MARGIN)
    assert sentence == (
        "So far (14 of 20 models scored), over 4 to 5 seeds, reverse does not differ from forward by more than the margin of 0.5 say/bleu; "
        "random has no score to compare with forward's; against none, forward and reverse are better, random is without a score."
    )


def test_the_reference_is_missing(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": FAR, "reverse": BASE, "random": NEAR})
    assert sentence == "Over 5 seeds, forward, which strategies are compared with, is not in this study; all beat none."


def test_the_reference_has_no_score(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": FAR, "forward": [None] * 5, "reverse": BASE})
    assert "forward, which strategies are compared with, has no score in say/bleu; " in sentence
    assert "against none, reverse is better, forward is without a score" in sentence


def test_a_baseline_without_scores_is_not_beaten(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"ce_only": [None] * 5, "none": FAR, "forward": BASE})
    assert sentence.endswith("over 5 seeds, forward beats none; no scores are there to compare with ce_only.")


def test_none_is_absent(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"forward": BASE, "reverse": NEAR}, margins=MARGIN)
    assert sentence.endswith("; what matching blocks adds is not known, since none (logits alone) was not trained.")


def test_none_as_the_reference(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": BASE, "forward": NEAR, "reverse": FAR}, margins=MARGIN, reference="none")
    assert sentence.startswith(
        "Over 5 seeds, forward does not differ from none by more than the margin of 0.5 say/bleu; reverse is worse than none by 9.94 "
    )
    assert sentence.count("none") == 2


def test_one_strategy_alone(tmp_path: Path) -> None:
    assert said(tmp_path, {"none": FAR, "forward": BASE}) == "Over 5 seeds, forward beats none."
    assert said(tmp_path / "worse", {"none": BASE, "forward": FAR}) == "Over 5 seeds, against none, forward is worse."


def test_no_baseline_is_said_to_be_beaten_without_a_test(tmp_path: Path) -> None:
    """10 above at each of two seeds, but the differences are all the same: they show no spread to test with."""
    sentence = said(tmp_path, {"none": (60.0, 62.0), "forward": (70.0, 72.0), "reverse": (71.0, 73.0)}, margins=MARGIN)
    assert sentence == (
        "Over 2 seeds, reverse can't be tested against forward (all seeds give the same difference, which shows no spread); "
        "against none, all are not tested."
    )


def test_holm_decides_not_the_single_p(tmp_path: Path) -> None:
    """p of reverse against forward is 0.03: a claim alone, none among four."""
    apart = [b + d for b, d in zip(BASE, (1.0, 0.2, 1.6, 0.5, 1.2), strict=True)]
    alone = said(tmp_path / "alone", {"none": FAR, "forward": BASE, "reverse": apart})
    assert "reverse is better than forward" in alone
    others = {"random": NOISY, "all_to_one": NOISY[::-1], "in_order_random": NOISY[2:] + NOISY[:2]}
    among = said(tmp_path / "among", {"none": FAR, "forward": BASE, "reverse": apart, **others})
    assert "reverse is better" not in among


def test_nothing_scored(tmp_path: Path) -> None:
    sentence = said(tmp_path, {"none": [None] * 2, "forward": [None] * 2})
    assert sentence == "So far (0 of 4 models scored), nothing can be concluded, since no model has a score."


def test_the_main_metric_is_never_replaced_by_another(tmp_path: Path) -> None:
    study = Folder(tmp_path, margins={"generation/bleu": 0.5, "say/bleu": 0.5})
    study.students({"none": FAR, "forward": BASE, "reverse": NEAR})
    results = study.results()
    assert results.primary is None
    assert results.conclusion == (
        "Nothing can be concluded, since no model has a score on generation/bleu, the study's main metric."
    )
    assert "The margin of generation/bleu tests nothing: no model has a score by that name." in results.notes


# ---------------------------------------------------------------------------------------------------------------------
# Notes


@pytest.mark.parametrize(
    ("history", "noted"),
    [
        ([], False),
        ([{"margins": MARGIN, "results": 0}], False),
        ([{"margins": {"say/bleu": 2.0}, "results": 0}, {"margins": MARGIN, "results": 0}], False),
        ([{"margins": MARGIN, "results": 0}, {"margins": MARGIN, "results": 9}], False),
        ([{"margins": {}, "results": 0}, {"margins": MARGIN, "results": 9}], True),
    ],
)
def test_margins_stated_with_results_in_sight_are_noted(tmp_path: Path, history: list[Any], noted: bool) -> None:
    study = Folder(tmp_path, margins=MARGIN, margins_history=history)
    study.students({"none": FAR, "forward": BASE})
    found = [note for note in study.results().notes if "margins were changed" in note]
    assert bool(found) == noted
    if noted:
        assert found[0].startswith(
            "The margins were changed from nothing to say/bleu 0.5 when 9 results were there already"
        )


def test_a_difference_that_hangs_on_the_items_is_noted(tmp_path: Path) -> None:
    """forward - none is 0.025 to 0.075 at each seed, but by a few items among many that go both ways."""
    study = Folder(tmp_path, margins={"choose/acc": 0.01})
    for frail in (True, False):
        for seed in range(5):
            ahead = seed % 3 + 1 if frail else 15 + seed % 3
            wrong = {
                "none": set(range(10, 20 + (0 if frail else ahead))),
                "forward": set(range(20, 30 - ahead)) if frail else set(),
            }
            for strategy, items in wrong.items():
                name = f"{strategy}-s{seed}" if not frail else study.entry("student", strategy, seed)
                lines = [{"task": "choose", "item": n, "metrics": {"acc": int(n not in items)}} for n in range(40)]
                study.score(name, 1.0, 1 - len(items) / 40)
                study.lines(f"evaluations/{name}.samples.jsonl", lines)
        results = study.results()
        assert "forward beats none" in results.conclusion
        hangs = (
            "Shown by the seeds, but another draw of test items might not show it: the difference of forward and none."
        )
        assert (hangs in results.notes) == frail
        assert any("hold for another draw" in note for note in results.notes) != frail


def test_thoughts_that_were_not_scored_are_noted(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    written: list[tuple[str, dict[str, Any]]] = [("forward", {"thoughts": 34}), ("reverse", {})]
    for strategy, thoughts in written:
        name = study.entry("student", strategy, 0, steps=("generation",))
        study.generated(name, {"bleu": 60.0}, **thoughts)
    expected = "Texts were scored without their thoughts (<think>…</think>), as no reference has any: 34 by forward-s0."
    assert expected in study.results().notes


def test_the_rows_that_each_source_of_a_mixture_gave_are_noted(tmp_path: Path) -> None:
    """Those of the longest run: a student that stopped early took fewer."""
    study = Folder(tmp_path)
    study.students({"none": FAR[:2], "forward": BASE[:2]})
    assert not any("mixture" in note for note in study.results().notes)
    study.write("students/none-s0/summary.json", {"sources": {"news": 30, "chats": 10}})
    study.write("students/forward-s0/summary.json", {"sources": {"news": 1200, "chats": 400}})
    expected = "Trained on a mixture; rows taken from each source: news 1,200 (75.0%), chats 400 (25.0%)."
    assert expected in study.results().notes
    report(tmp_path)
    for form in ("report.md", "report.html"):
        assert expected in (tmp_path / form).read_text()


def test_what_was_not_alike_is_noted(tmp_path: Path) -> None:
    study = Folder(tmp_path)
    study.students({"none": FAR[:2], "forward": BASE[:2]})
    study.score("none-s0", 60.0, versions={"lm_eval": "0.4.12"}, backend="vllm", items={"say": 20, "choose": 200})
    notes = " ".join(study.results().notes)
    assert "lm-eval ran on vllm for none-s0, hf for none-s1, forward-s0 and forward-s1" in notes
    assert "lm_eval was 0.4.12 for some and 0.4.13 for others" in notes
    assert "say had 20 items for some models and 200 for others" in notes
    assert "Two seeds make wide intervals" in notes
