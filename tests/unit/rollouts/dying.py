"""Stands for vLLM's process: it dies at its first order, as often as `mixed_with` says, counted in a file, and then writes."""

from __future__ import annotations

import os
from pathlib import Path

from llmkd.errors import InputError
from llmkd.inference.child import listen
from llmkd.rollouts.vllm_process import serve
from llmkd.rollouts.writer import Asked


def main() -> int:
    shared, orders, say = listen()
    deaths, _, file = shared["mixed_with"].partition(" ")
    starts = Path(file)

    def write(asked: Asked) -> list[list[int]]:
        starts.write_text(starts.read_text() + "x")
        if len(starts.read_text()) <= int(deaths):
            os._exit(7)
        if not asked.weights:
            raise InputError("rollouts: no such weights; give some")
        return [[9]] * len(asked.prompts)

    return serve(write, orders, say)


if __name__ == "__main__":
    raise SystemExit(main())
