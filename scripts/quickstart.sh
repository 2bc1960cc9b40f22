#!/usr/bin/env bash
# From nothing to a report: makes the environment if need be, then runs the embedded study on two ranks.
# What is already done is kept: a second call installs nothing and goes on where the study stands.
# Arguments are handed on to `llmkd study`, for example: bash scripts/quickstart.sh --set study.seeds=[0]
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh
exec llmkd study recipes/quickstart.yaml "$@"
