"""From a recipe to a prepared run: the job, its parts, checkpoints, metrics, and the writing of a teacher's cache."""
