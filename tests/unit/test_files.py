"""A run's logs after a hard day: what is no whole line of them is left out."""

from __future__ import annotations

from pathlib import Path

from llmkd.files import forget_after, read_lines

WHOLE = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}, {"step": 4, "loss": 1.5}]
LINES = (
    b'{"step": 1, "loss": 2.5}',
    b"3",  # a line of another file
    b'["step", 1]',
    b'{"step": 2, "loss": 2.0}',
    b'{"\xf3tep": 3, "loss": 9.0}',  # a flipped bit, which leaves no UTF-8
    b'{"step": "1", "loss": 9.0}',
    b"[" * 100_000,
    b'{"step": 4, "loss": 1.5}',
    b'{"step": 5, "lo',
)


def test_what_is_no_line_of_a_log_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"\n".join(LINES))
    read = read_lines(file)
    assert [line for line in read if line.get("step") in (1, 2, 4)] == WHOLE and len(read) == 5
    assert read_lines(file, 1) == WHOLE[:1]
    forget_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n'


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    forget_after(tmp_path / "none.jsonl", 2)
    assert read_lines(tmp_path / "none.jsonl") == [] and not list(tmp_path.iterdir())
