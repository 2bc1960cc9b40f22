"""Texts that models write during training, round by round, and their way into batches."""
