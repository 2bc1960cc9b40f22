"""The sections of a recipe: what each key means, and which values go together. `llmkd.config` puts them together."""
