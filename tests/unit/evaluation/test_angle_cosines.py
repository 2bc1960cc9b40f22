"""Angles between teacher states as a student's state sees them: known ones, loops in float64, padding, chunks, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmkd.data.batches import Batch, collate
from llmkd.data.formats import RowFormat
from llmkd.data.rows import load_rows
from llmkd.data.tokens import tokenize
from llmkd.errors import InputError
from llmkd.evaluation.angles import cosines
from llmkd.evaluation.angles.cosines import BINS, CodeCosine, PairCosines, pairs_of
from llmkd.evaluation.angles.results import BlockAngles, PaperCode, StudentView
from llmkd.evaluation.angles.states import StudentObserver, TeacherStates, observe
from llmkd.models import load, make
from tests.tensor_bytes import TensorBytes

Load: Any = AutoModelForCausalLM.from_pretrained
CPU = torch.device("cpu")


def naive(student: Tensor, teacher: Sequence[Tensor]) -> dict[tuple[int, int], list[float]]:
    """[n, H] and L x [n, H] -> every pair's cosines, one token after another in float64."""
    found: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs_of(len(teacher))}
    for token in range(len(student)):
        for i, j in found:
            u, v = (teacher[block][token].double() - student[token].double() for block in (i, j))
            found[i, j].append((u @ v / (u.norm() * v.norm())).item())
    return found


def code_of(view: StudentView) -> PaperCode:
    assert view.paper_code is not None
    return view.paper_code


def check(result: BlockAngles, wanted: dict[tuple[int, int], list[float]], tolerance: float = 1e-5) -> None:
    """A block's result is the mean, share, count and histogram of the wanted cosines."""
    for number, ((i, j), values) in enumerate(wanted.items()):
        share = sum(value > 0 for value in values) / len(values)
        assert result.mean[i][j] == result.mean[j][i] == pytest.approx(sum(values) / len(values), abs=tolerance)
        assert result.above_zero[i][j] == result.above_zero[j][i] == pytest.approx(share)
        assert result.counted[number] == sum(result.histogram[number]) == len(values)
        counts = [0] * BINS
        for value in values:
            counts[min(int((value + 1) / 2 * BINS), BINS - 1)] += 1
        assert result.histogram[number] == counts
    means = [sum(values) / len(values) for values in wanted.values()]
    assert result.mean_of_pairs == pytest.approx(sum(means) / len(means), abs=tolerance)


def everywhere(states: Tensor) -> Tensor:
    """All flat positions of [B, T, H]."""
    return torch.arange(states.shape[0] * states.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def test_known_angles() -> None:
    """From (1, 1): to the right, up, left, and up to the right; a right angle, an obtuse one, an acute one."""
    student = torch.tensor([[[1.0, 1.0]]])
    teacher = [torch.tensor([[point]]) for point in ([3.0, 1.0], [1.0, 5.0], [-1.0, 1.0], [2.0, 2.0])]
    seen = PairCosines(4)
    seen.add(student, teacher, everywhere(student))
    result = seen.result()
    right, up, left, diagonal = range(4)
    assert result.mean[right][up] == 0 and result.above_zero[right][up] == 0
    assert result.mean[right][left] == -1 and result.above_zero[right][left] == 0
    assert result.mean[up][diagonal] == pytest.approx(math.sqrt(0.5)) and result.above_zero[up][diagonal] == 1
    assert result.mean[left][diagonal] == pytest.approx(-math.sqrt(0.5))
    assert [result.mean[i][i] for i in range(4)] == [1.0] * 4
    by_pair = dict(zip(pairs_of(4), result.histogram, strict=True))
    assert by_pair[right, left][0] == 1 and by_pair[right, up][BINS // 2] == 1
    assert result.without_direction == [0] * 4


def test_a_state_that_equals_the_students_has_no_direction() -> None:
    """It is counted apart, not as 0; so is one that differs by rounding alone, whatever the states' size."""
    student = torch.tensor([[[1.0, 1.0], [1000.0, 0.0], [0.0, 0.0]]])
    teacher = [
        torch.tensor([[[1.0, 1.0], [1000.0, 5e-4], [1.0, 0.0]]]),
        torch.tensor([[[2.0, 1.0], [1001.0, 0.0], [1.0, 1.0]]]),
        torch.tensor([[[2.0, 2.0], [1001.0, 1.0], [1.0, 1.0]]]),
    ]
    seen = PairCosines(3)
    seen.add(student, teacher, everywhere(student))
    result = seen.result()
    assert result.without_direction == [2, 0, 0] and result.counted == [1, 1, 3]
    assert result.mean[0][1] == pytest.approx(math.sqrt(0.5))
    assert result.mean[1][2] == pytest.approx((2 * math.sqrt(0.5) + 1) / 3)


def test_a_block_that_never_has_a_direction_has_no_number() -> None:
    student = torch.randn(1, 3, 4)
    seen = PairCosines(2)
    seen.add(student, [student, torch.randn(1, 3, 4)], everywhere(student))
    result = seen.result()
    assert result.mean == [[None, None], [None, 1.0]] and result.mean_of_pairs is None
    assert result.counted == [0] and result.above_zero[0][1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_are_those_of_a_loop(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of seven tokens, several batches, a projector to the teacher's width."""
    torch.manual_seed(0)
    monkeypatch.setattr(cosines, "CHUNK", 7 * 5 * 16)
    project = torch.nn.Linear(8, 16).requires_grad_(False)
    project = project.double() if dtype == torch.float64 else project
    seen, wanted = PairCosines(5), {pair: [] for pair in pairs_of(5)}
    for size in (1, 4, 3):
        student = torch.randn(size, 6, 8, dtype=dtype)
        teacher = [(torch.randn(size, 6, 16) + block / 4).to(dtype) for block in range(5)]
        at = torch.randperm(size * 6)[: size * 5]
        seen.add(student, teacher, at, project)
        theirs = [state.flatten(0, 1)[at] for state in teacher]
        for pair, values in naive(project(student.flatten(0, 1)[at].to(project.weight.dtype)), theirs).items():
            wanted[pair] += values
    check(seen.result(), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(3, 5, 8), [torch.randn(3, 5, 8) for _ in range(4)]
    plain = PairCosines(4)
    plain.add(student, teacher, everywhere(student))
    attended = torch.ones(3, 5, dtype=torch.bool)
    code = CodeCosine()
    code.add(student, teacher[0], teacher[3], attended)
    pad = (2, 0) if side == "left" else (0, 2)

    def padded(states: Tensor) -> Tensor:
        return torch.nn.functional.pad(states, (0, 0, *pad), value=math.nan)

    at = torch.nn.functional.pad(attended, pad).flatten().nonzero().flatten()
    seen = PairCosines(4)
    seen.add(padded(student), [padded(state) for state in teacher], at)
    assert seen.result() == plain.result()
    other = CodeCosine()
    other.add(padded(student), padded(teacher[0]), padded(teacher[3]), torch.nn.functional.pad(attended, pad))
    assert other.result().tokens == code.result().tokens
    assert (other.result().with_padding.not_finite, other.result().with_padding.counted) == (6, 15)


def test_states_that_are_no_numbers_are_refused() -> None:
    student = torch.randn(1, 2, 4)
    seen = PairCosines(2)
    seen.add(student, [torch.full((1, 2, 4), math.nan), student + 1], everywhere(student))
    with pytest.raises(InputError, match="not finite: the training has diverged; lower its learning rate"):
        seen.result()


def test_one_teacher_block_makes_no_pair() -> None:
    student = torch.randn(1, 2, 4)
    seen = PairCosines(1)
    seen.add(student, [student + 1], everywhere(student))
    result = seen.result()
    assert (result.mean, result.counted, result.mean_of_pairs) == ([[1.0]], [], None)


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny teacher and a random student of 3 blocks."""
    student = tmp_path_factory.mktemp("students") / "random"
    make.random_student(tiny / "teacher", 3, {}, student, seed=5, dtype=torch.float32)
    return tiny / "teacher", student


@pytest.fixture(scope="module")
def rows(tiny: Path) -> list[dict[str, Any]]:
    tokenizer = load.load_tokenizer(tiny / "teacher")
    read = load_rows(str(tiny / "rows.jsonl"), name=None, split="train", rows=8)
    data = tokenize(read, tokenizer, row_format=RowFormat(), max_length=64, too_long="drop")
    return [data[number] for number in range(len(data))]


def batches_of(rows: list[dict[str, Any]], size: int) -> list[Batch]:
    return [collate(rows[start : start + size], pad_id=0, packed=False) for start in range(0, len(rows), size)]


def seen_from(folders: tuple[Path, Path], batches: list[Batch], normed: bool) -> StudentView:
    teacher = TeacherStates(Load(folders[0], attn_implementation="sdpa"))
    student = StudentObserver(Load(folders[1], attn_implementation="sdpa"), teacher, normed_last=normed)
    observe(teacher, [student], batches, CPU)
    (stack,) = student.views()
    return stack


@pytest.mark.parametrize("normed", [False, True])
def test_models_states_are_those_of_hidden_states(
    folders: tuple[Path, Path], rows: list[dict[str, Any]], normed: bool
) -> None:
    """Every block against `output_hidden_states`, row by row in float64; the paper code's line too."""
    result = seen_from(folders, batches_of(rows, 3), normed)
    sides = []
    for folder in folders:
        model, states = Load(folder).double(), []
        raw: list[Tensor] = []
        model.model.layers[-1].register_forward_hook(lambda module, args, output, raw=raw: raw.append(output[0]))
        for row in rows:
            with torch.no_grad():
                found = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
            states.append([state[0] for state in found])
        whole = [torch.cat([one[block] for one in states]) for block in range(len(states[0]))]
        blocks = whole[1:] if normed else [*whole[1:-1], torch.cat(raw)]
        sides.append((blocks, whole))
    (teacher, teacher_hf), (student, student_hf) = sides
    assert [block.block for block in result.blocks] == [0, 1, 2]
    for block, ours in zip(result.blocks, student, strict=True):
        wanted = naive(ours, teacher)
        for number, ((i, j), values) in enumerate(wanted.items()):
            assert block.mean[i][j] == pytest.approx(sum(values) / len(values), abs=1e-4)
            assert block.counted[number] == len(values)
            assert block.above_zero[i][j] == pytest.approx(sum(v > 0 for v in values) / len(values), abs=2 / 150)
    u, v = teacher_hf[1] - student_hf[1], teacher_hf[-1] - student_hf[1]
    code = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1) + 1e-6)
    tokens = code_of(result).tokens
    assert tokens.mean == pytest.approx(code.mean().item(), abs=1e-5) and tokens.counted == len(code)
    padded = code_of(result).with_padding
    assert padded.counted == sum(b.attended.numel() for b in batches_of(rows, 3)) > tokens.counted


def test_students_of_one_pass_may_look_at_either_last_state(
    folders: tuple[Path, Path], rows: list[dict[str, Any]]
) -> None:
    teacher = TeacherStates(Load(folders[0], attn_implementation="sdpa"))
    both = [StudentObserver(Load(folders[1]), teacher, normed_last=normed) for normed in (True, False)]
    observe(teacher, both, batches_of(rows, 3), CPU)
    apart = [seen_from(folders, batches_of(rows, 3), normed) for normed in (True, False)]
    assert [one.views() for one in both] == [[one] for one in apart] and apart[0].blocks[0] != apart[1].blocks[0]


def test_batches_do_not_change_the_numbers(folders: tuple[Path, Path], rows: list[dict[str, Any]]) -> None:
    one, many = (seen_from(folders, batches_of(rows, size), False) for size in (8, 1))
    for ours, theirs in zip(one.blocks, many.blocks, strict=True):
        assert ours.counted == theirs.counted
        torch.testing.assert_close(torch.tensor(ours.mean), torch.tensor(theirs.mean), atol=1e-5, rtol=0)
    assert code_of(one).tokens.mean == pytest.approx(code_of(many).tokens.mean, abs=1e-5)


def test_what_stands_at_padding_changes_nothing(folders: tuple[Path, Path], rows: list[dict[str, Any]]) -> None:
    """Through the models: padding stands behind a row, so it enters neither the attention of its tokens nor the angles."""
    [batch] = batches_of(rows, 8)
    assert not batch.attended.all()
    other = replace(batch, input_ids=torch.where(batch.attended, batch.input_ids, batch.input_ids.flip(0).flip(1)))
    first, second = seen_from(folders, [batch], False), seen_from(folders, [other], False)
    for ours, theirs in zip(first.blocks, second.blocks, strict=True):
        assert ours.counted == theirs.counted
        torch.testing.assert_close(torch.tensor(ours.mean), torch.tensor(theirs.mean), atol=1e-5, rtol=0)


def test_the_teacher_seen_from_itself_lacks_its_own_direction(
    folders: tuple[Path, Path], rows: list[dict[str, Any]]
) -> None:
    result = seen_from((folders[0], folders[0]), batches_of(rows, 4), False)
    for number, block in enumerate(result.blocks):
        tokens = sum(len(row["input_ids"]) for row in rows)
        assert block.without_direction == [tokens if other == number else 0 for other in range(6)]
    assert code_of(result).tokens.mean == 0  # T_1 is S_1, which the paper's code counts as 0


def test_no_more_than_one_batch_is_held(folders: tuple[Path, Path], rows: list[dict[str, Any]]) -> None:
    """Four batches of the same shape make the same peak as one, to the byte; and nothing is left but sums."""
    (batch,) = batches_of(rows, 8)
    teacher = TeacherStates(Load(folders[0], attn_implementation="sdpa"))
    student = StudentObserver(Load(folders[1], attn_implementation="sdpa"), teacher, normed_last=False)
    observe(teacher, [student], [batch], CPU)
    peaks, left = [], []
    for count in (1, 4):
        with TensorBytes() as made:
            observe(teacher, [student], [batch] * count, CPU)
            peaks.append(made.peak)
            left.append(made.live)
    state = batch.attended.numel() * 32 * 4
    assert peaks[0] == peaks[1] and 6 * state < peaks[0]
    assert left[0] == left[1] < state


def test_widths_that_differ_need_a_projector(
    folders: tuple[Path, Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    make.random_student(
        folders[0], 3, {"hidden_size": 16, "head_dim": 4}, tmp_path / "narrow", seed=5, dtype=torch.float32
    )
    teacher = TeacherStates(Load(folders[0]))
    with pytest.raises(InputError, match="16 wide and the teacher's 32, and no projector.*; give a student of the"):
        StudentObserver(Load(tmp_path / "narrow"), teacher, normed_last=False)
    projectors = {block: torch.nn.Linear(16, 32, bias=False).requires_grad_(False) for block in (1, 2)}
    student = StudentObserver(Load(tmp_path / "narrow"), teacher, normed_last=False, projectors=projectors)
    observe(teacher, [student], batches_of(rows, 8), CPU)
    (result,) = student.views()
    assert [block.block for block in result.blocks] == [1, 2] and result.paper_code is None
    assert all(value is not None and -1 < value < 1 for block in result.blocks for value in [block.mean[0][5]])
