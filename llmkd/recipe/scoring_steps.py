"""The steps that score a study's models: what each is called in the recipe, in a study's folder, in its entries and among the modules."""

from __future__ import annotations

from dataclasses import dataclass

from llmkd.recipe.evaluation import Evaluation


@dataclass(frozen=True)
class ScoringStep:
    """The names of one step."""

    name: str
    """In logs, in reports and of the step's log file."""
    key: str
    """The key under `evaluation` in the recipe that asks for the step."""
    folder: str
    """Where a study keeps its results."""
    module: str
    """What does the work, in a process of its own: `python -m module`."""
    entry: str | None = None
    """The key of a study's entry that names the model's result file; None for a step without scores in the report's table."""
    of_teacher: bool = True
    """Whether the teacher is scored too."""

    def asked(self, settings: Evaluation) -> bool:
        """Whether a recipe's `evaluation` section asks for the step."""
        return bool(getattr(settings, self.key))


GENERATION = ScoringStep("generation", "generation", "generations", "llmkd.evaluation.generation", "generation")
CLASSIFICATION = ScoringStep(
    "classification", "classification", "classifications", "llmkd.evaluation.classification", "classification"
)
LM_EVAL = ScoringStep("lm-eval", "tasks", "evaluations", "llmkd.evaluation.lm_eval_worker", "evaluation")
AGREEMENT = ScoringStep(
    "agreement", "agreement_rows", "agreement", "llmkd.evaluation.agreement", "agreement", of_teacher=False
)
ANGLES = ScoringStep("angles", "angles_rows", "angles", "llmkd.evaluation.angles.measure", of_teacher=False)

SCORING_STEPS = (GENERATION, CLASSIFICATION, LM_EVAL, AGREEMENT, ANGLES)
"""In the order in which a study takes them, and in which the report shows them; the agreement reads the generated texts."""
