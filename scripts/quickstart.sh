#!/usr/bin/env bash
# From nothing to a report: makes the environment if need be, then runs the embedded study on two ranks.
# A second call installs nothing and continues where the study stopped.
# Arguments go to `llmkd study`, for example: bash scripts/quickstart.sh --set study.seeds=[0]
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh

# For models as small as the recipe's Hugging Face would be chosen; here vLLM writes the texts wherever it is installed.
backend=vllm
if ! python -c 'import sys; from llmkd.inference.vllm_setup import vllm_version; sys.exit(vllm_version() is None)'; then
  backend=hf
  llmkd_say "vLLM is not installed here, so Hugging Face writes the texts (LLMKD_VLLM=1 bash scripts/environment.sh installs it)"
fi
exec llmkd study recipes/quickstart.yaml --set "evaluation.generation.backend=$backend" "$@"
