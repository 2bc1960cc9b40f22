"""Measured figures, each with its command; results are in RESULTS files beside."""
