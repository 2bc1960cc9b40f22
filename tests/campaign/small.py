"""Imported by the server that forks the campaign's commands: shards of few rows, so that few rows fill many."""

from __future__ import annotations

from llmkd.data import token_files
from llmkd.rollouts import by_teacher

token_files.SHARD_ROWS = 500
by_teacher.SHARD_ROWS = 10
