"""lm-eval's own definition of a task, read from the installed lm-eval, on rows that lie in a file here.

The file is the one the YAML names under `dataset_kwargs`, relative to the current folder. Another folder of
scripts/fetch_choice_data.py is named at the call, as `choice_data` in the task's metadata:
`lm_eval --metadata '{"choice_data": "FOLDER"}'` or `TaskManager(metadata={"choice_data": "FOLDER"})`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml


class LocalChoice(ConfigurableTask):
    """The packaged task `definition` (a path below lm_eval/tasks) with nothing changed but its name and its rows."""

    def __init__(self, config: dict[str, Any]) -> None:
        definition = load_yaml(Path(lm_eval.tasks.__file__).parent / config["definition"])
        rows = Path(config["dataset_kwargs"]["data_files"]["validation"])
        if folder := config["metadata"].get("choice_data"):
            rows = Path(folder, "validation", rows.name)
        if not rows.is_file():
            raise FileNotFoundError(
                f"no file {rows}: make it with `python scripts/fetch_choice_data.py`, or name the folder that script "
                'has made: --metadata \'{"choice_data": "FOLDER"}\''
            )
        local = {
            "task": config["task"],
            "metadata": {**definition.get("metadata", {}), **config["metadata"]},
            "dataset_path": config["dataset_path"],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(rows)}},
            "training_split": None,  # only few-shot examples would be drawn from it
            "test_split": None,
        }
        super().__init__(config={**definition, **local})
