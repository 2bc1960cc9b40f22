"""Measurements of llmkd beside what one would do without it. Each module is a command: `python -m benchmarks.step --help`."""
