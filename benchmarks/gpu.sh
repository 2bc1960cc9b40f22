#!/usr/bin/env bash
# The benchmarks on this machine's GPUs. Parts of it were run by hand on one H200, one to two minutes each with five rounds; the script
# as a whole, and several GPUs, have not been.
#
#   bash benchmarks/gpu.sh                 all parts
#   LLMKD_PEAK_TFLOPS=989 ...              the GPU's dense bf16 peak, for the share that is used (default: H100 and H200, 989)
#
# The head alone; then Qwen3-1.7B-shaped, 28 -> 7 blocks, everybody in one run, TRL's trainers too, with Liger's kernels and without; then
# Qwen3-8B-shaped, 36 -> 9 blocks, 4096 tokens per GPU. There student, optimizer and teacher take 61 GiB and a step 31 more, so on less than
# one GPU of 100 GiB or two of 80 the optimizer waits in host memory (72 GB of it), and a step is bound by the host.
# The last two write their tables into benchmarks/RESULTS.md; traces for chrome://tracing go to artifacts/traces.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
pip install --quiet -e '.[bench]' liger-kernel
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv

gpus=$(nvidia-smi -L | wc -l)
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
peak=${LLMKD_PEAK_TFLOPS:-989}
common=(--ranks "$gpus" --peak-tflops "$peak" --profile --write)

python -m benchmarks.head

python -m benchmarks.step --size medium --deepspeed zero2 --repeat 10 --trace artifacts/traces/medium "${common[@]}"

large=(--size large --tokens 4096 --repeat 5 --trace artifacts/traces/large "${common[@]}")
if ((memory >= 100000)); then
  python -m benchmarks.step --deepspeed zero2 "${large[@]}" --only unavoidable --only llmkd
elif ((gpus * memory >= 300000)); then
  python -m benchmarks.step --deepspeed zero3 "${large[@]}"
else
  echo "[gpu] one student alone fits $gpus x $memory MiB, with its optimizer in host memory" >&2
  python -m benchmarks.step --deepspeed zero3_offload_cpu "${large[@]}" --only unavoidable --only llmkd --only plain --only pairs
fi
