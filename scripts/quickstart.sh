#!/usr/bin/env bash
# From nothing to a report: makes the environment if need be, then runs the embedded study on two ranks.
# What is already done is kept: a second call installs nothing and goes on where the study stands.
# Arguments are handed on to `llmkd study`, for example: bash scripts/quickstart.sh --set study.seeds=[0]
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh

# The recipe's models are so small that Hugging Face would be chosen; the final texts are vLLM's all the same, where it is installed.
backend=vllm
if ! python -c 'import sys; from llmkd.inference.vllm_setup import vllm_version; sys.exit(vllm_version() is None)'; then
  backend=hf
  llmkd_say "vLLM is not installed here, so Hugging Face writes the texts (LLMKD_VLLM=1 bash scripts/environment.sh installs it)"
fi
exec llmkd study recipes/quickstart.yaml --set "evaluation.generation.backend=$backend" "$@"
