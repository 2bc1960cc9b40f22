#!/usr/bin/env bash
# From nothing to a report: makes the environment if need be, then runs the embedded study on two ranks.
# A second call installs nothing and continues where the study stopped.
# Arguments go to `llmkd study`, for example: bash scripts/quickstart.sh --set study.seeds=[0]
# Models this small do not repay vLLM's start; --set evaluation.generation.backend=vllm has it write the texts all the same.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh
exec llmkd study recipes/quickstart.yaml "$@"
