"""Continue token ids with a model folder, by Hugging Face or vLLM."""
