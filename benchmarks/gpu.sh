#!/usr/bin/env bash
# What is to be seen on a machine with GPUs: the tests that need one, and the benchmarks. Each part has a limit of two minutes or less and
# a log of its own, so that one's failure leaves the others; what is most likely to be wrong comes first.
#
#   bash benchmarks/gpu.sh                    all parts
#   bash benchmarks/gpu.sh head step          parts whose names begin so
#   LLMKD_PEAK_TFLOPS=989 ...                 the GPU's dense bf16 peak, for the share that is used (default: H100 and H200, 989)
#   LLMKD_LOGS=FOLDER ...                     where the logs go (default: artifacts/gpu)
#   LLMKD_WHEELS=FOLDER ...                   without a network: wheels of all that the machine's own Python lacks, for that Python
#
# A line for each part says how it ended, and the end of its log. With a network the environment is made as scripts/test.sh makes it, and TRL
# and Liger are installed into it; with wheels nothing is written but the logs.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
nvidia-smi -L >/dev/null 2>&1 || { echo "[gpu] error: nvidia-smi finds no GPU on this machine; nothing was run" >&2; exit 2; }
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
logs=${LLMKD_LOGS:-artifacts/gpu}
mkdir -p "$logs"

if [[ -n ${LLMKD_WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$LLMKD_WHEELS"/*.whl || exit
  export PYTHONPATH=$site:$PWD
else
  source scripts/environment.sh
  pip install --quiet -e '.[bench,liger]'
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
gpus=$(nvidia-smi -L | wc -l)
memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)

chosen=("$@")
# part NAME SECONDS LINES COMMAND...: run the command if the name is among those asked for; show so many lines of its end
part() {
  local name=$1 limit=$2 lines=$3 began=$SECONDS status=0 asked
  shift 3
  if ((${#chosen[@]})); then
    for asked in "${chosen[@]}"; do [[ $name == "$asked"* ]] && break; done
    [[ $name == "$asked"* ]] || return 0
  fi
  timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1 || status=$?
  echo "== $name: exit $status after $((SECONDS - began)) of $limit s; $logs/$name.log"
  tail -n "$lines" "$logs/$name.log" | cut -c 1-220
}

tests=(python3 -m pytest -m gpu tests/gpu -q -o filterwarnings=default -p no:cacheprovider)
step=(python3 -m benchmarks.step --ranks "$gpus" --peak-tflops "${LLMKD_PEAK_TFLOPS:-989}" --only unavoidable --only llmkd/forward)
large=("${step[@]}" --size large --tokens 4096)
versions='import torch, transformers, deepspeed, datasets, llmkd.train, benchmarks.step
print(torch.__version__, transformers.__version__, deepspeed.__version__, torch.cuda.nccl.version(), torch.cuda.get_device_name())'

part imports 60 4 python3 -c "$versions"
part tests-head-triton 120 12 "${tests[@]}" -k "test_head and triton"
part tests-head-others 120 12 "${tests[@]}" -k "test_head and not triton"
part tests-step 120 12 "${tests[@]}" -k "test_step or test_offload or test_varlen or test_blocks"
part tests-runs 120 12 "${tests[@]}" -k "test_train and not cache"
part tests-cache 100 12 "${tests[@]}" -k "test_train and cache"
part tests-others 120 20 "${tests[@]}" -k "not test_head and not test_step and not test_offload and not test_varlen and not test_blocks and not test_train"
part head 120 30 python3 -m benchmarks.head
part head-jsd 60 12 python3 -m benchmarks.head --divergence jsd
part head-topk 60 12 python3 -m benchmarks.head --divergence top_k

# 36 -> 9 blocks of Qwen3-8B, 4,096 tokens per GPU: student, optimizer and teacher take 61 GiB, a step 31 more.
if ((memory >= 100000)); then fits=(--deepspeed zero2); elif ((gpus * memory >= 300000)); then fits=(--deepspeed zero3); else
  echo "[gpu] a student fits $gpus x $memory MiB with its optimizer in host memory alone: the step is bound by the host" >&2
  fits=(--deepspeed zero3_offload_cpu)
fi
part large 100 40 "${large[@]}" "${fits[@]}" --repeat 5 --profile
# The same with its blocks compiled, made of Liger's parts, and both.
part blocks-compiled 120 14 "${large[@]}" "${fits[@]}" --repeat 3 --blocks compiled
part blocks-liger 90 14 "${large[@]}" "${fits[@]}" --repeat 3 --blocks liger
part blocks-both 120 14 "${large[@]}" "${fits[@]}" --repeat 3 --blocks liger-compiled
# 28 -> 7 blocks of Qwen3-1.7B, TRL's trainers beside it, with Liger's kernels and without.
part trl 120 45 "${step[@]}" --size medium --deepspeed zero2 --repeat 5 --only "llmkd/none kl alone" --only trl
part waiting 90 12 python3 -m benchmarks.data waiting
