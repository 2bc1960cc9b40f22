"""Hugging Face models: which kinds, where their blocks and heads are, how they are loaded and made."""
