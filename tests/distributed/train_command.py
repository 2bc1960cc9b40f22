"""`python llmkd/train.py ARGUMENTS` on every rank, each with its own: a file of one list of arguments per rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llmkd import train


def main() -> None:
    """One rank's part."""
    sys.argv[1:] = json.loads(Path(sys.argv[1]).read_text())[int(os.environ["RANK"])]
    train.main()
