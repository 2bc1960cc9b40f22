#!/usr/bin/env bash
# Everything a change must pass: lint, format, types, the direction of imports, tests. Arguments go to pytest.
# Every step runs, so that one call shows all that is wrong; the exit status is that of the first step that failed.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/environment.sh

# The tests use no network, and no GPU unless asked (-m gpu; see tests/conftest.py).
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1 # else pyright asks PyPI for a newer pyright

# A worker per core, at most four: each takes up to 3 GiB. A file stays in one worker, which makes what its tests share once; the files go
# in their own order, which has the long ones first.
workers=$(env -u OMP_NUM_THREADS nproc) # nproc would take that variable for the number
((workers <= 4)) || workers=4
[[ "$*" != *gpu* ]] || workers=0 # the GPU is not shared

first_failure=0
failed=()
step() {
  local status=0
  llmkd_say "$1"
  "${@:2}" || status=$?
  if [[ $status != 0 ]]; then
    failed+=("$1")
    [[ $first_failure != 0 ]] || first_failure=$status
  fi
}

step "Triton" llmkd_add_triton # without a network the rest is tested all the same
step "lint" ruff check .
step "format" ruff format --check .
step "imports" lint-imports --no-cache --no-logo

# The types take one core a minute and a half: they are checked beside the tests, and what is wrong is shown as soon as it is found.
types=$(mktemp)
set -m # a group of its own, which can be ended whole
(
  status=0
  pyright --pythonpath "$(command -v python)" >"$types" 2>&1 || status=$?
  cat "$types"
  exit "$status"
) &
checking=$!
set +m
# "|| true": the check has usually ended by then, and a failing kill would make the exit status of all 1.
trap 'kill -- "-$checking" 2>/dev/null || true; rm -f "$types"' EXIT

step "tests" python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@" # a later -n counts
step "types" wait "$checking"

if [[ $first_failure != 0 ]]; then
  llmkd_say "failed: ${failed[*]}"
  exit "$first_failure"
fi
llmkd_say "all passed"
