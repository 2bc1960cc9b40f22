"""Functions that the YAML tasks of this folder name with `!function`: data and scores of the built-in records task.

lm_eval --model hf --model_args pretrained=FOLDER --include_path eval --tasks records_generation,records_choice
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

if importlib.util.find_spec("llmkd") is None:  # the lm_eval command in a checkout that is not installed
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from llmkd.data import records
from llmkd.evaluation import text_metrics

FEWSHOT_EXAMPLES = 64


def record_splits(items: int = 1000, records_seed: int = 0, **_: Any) -> DatasetDict:
    """The test split, and a little of the training split for few-shot prompts.

    The keywords are the YAML's `dataset_kwargs`; lm-eval adds its model arguments to them, of which vLLM's has a `seed`.
    """
    made = {
        "test": records.examples("test", records_seed, 0, items),
        "train": records.examples("train", records_seed, 0, FEWSHOT_EXAMPLES),
    }
    return DatasetDict({split: Dataset.from_list([_row(example) for example in rows]) for split, rows in made.items()})


def _row(example: records.Example) -> dict[str, Any]:
    """The example with its choices.

    The record goes as slots and values: a Dataset would give each row every slot, None where absent.
    """
    completions, gold = records.choices(example)
    return {
        "prompt": example["prompt"],
        "completion": example["completion"].strip(),
        "references": example["references"],
        "slots": list(example["record"]),
        "values": list(example["record"].values()),
        "choices": [completion.strip() for completion in completions],
        "gold": gold,
    }


def score_sentences(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """One item's scores: `slots_exact` is 1 if every slot is right, `slots` is the share that is."""
    text = results[0].strip()
    share = records.slots_right(dict(zip(doc["slots"], doc["values"], strict=True)), text)
    pair = (doc["references"], text)
    return {"bleu": pair, "chrf": pair, "slots_exact": float(share == 1.0), "slots": share}


def bleu(items: list[tuple[list[str], str]]) -> float:
    """Corpus BLEU against all references of each item.

    lm-eval's own keeps only as many references as the poorest item has.
    """
    return text_metrics.bleu([(text, references) for references, text in items])


def chrf(items: list[tuple[list[str], str]]) -> float:
    """Corpus chrF, each item against its nearest reference."""
    return text_metrics.chrf([(text, references) for references, text in items])
