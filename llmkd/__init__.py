"""llmkd: distil large language models with intermediate-layer matching as a first-class, measured thing."""

__version__ = "0.1.0"
