#!/usr/bin/env bash
# Trains one student on the nodes of a Slurm job, from the repository's root:
#
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 scripts/slurm.sh --recipe qwen3_32b_to_16_blocks_4x8 --strategy forward
#
# Arguments are those of llmkd/train.py; options of sbatch stand before the script. One torchrun on each node starts a rank per GPU, without a
# host file and without ssh. docs/multi_node.md says what the nodes must share.
#
#   LLMKD_RANKS_PER_NODE=N  ranks on each node (default: its GPUs, or 1 where the job has none)
#   LLMKD_VENV=FOLDER       the environment (default: .venv)
#   LLMKD_PORT=N            where the ranks meet, on the first node (default: by the job's number)
#   LLMKD_GRACE_SECONDS=N   how long the ranks may take to save once they are told to stop (default: 600)
#
# A preempted job (SIGTERM) saves after the step it is in; Slurm starts it again if the partition requeues. Ten minutes before its time is
# over (SIGUSR1) the job does the same and puts itself back into the queue. Either way it goes on from the last checkpoint.
#
#SBATCH --job-name=llmkd
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#SBATCH --open-mode=append
#SBATCH --output=llmkd-%j.log
set -uo pipefail

say() { printf '[slurm.sh] %s\n' "$*" >&2; }
fail() {
  say "error: $*"
  exit 2
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is no Slurm job; start it by: sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh --recipe R"
# Slurm runs a copy of this file, which lies elsewhere.
cd "${SLURM_SUBMIT_DIR:-.}" || exit
[[ -f llmkd/train.py ]] || fail "$PWD has no llmkd/train.py; give sbatch's command in the repository's root, or --chdir to it"
environment=${LLMKD_VENV:-.venv}
[[ -f $environment/bin/activate ]] || fail "$environment is no Python environment; make it by scripts/environment.sh, or set LLMKD_VENV"
# shellcheck disable=SC1091
source "$environment/bin/activate"

nodes=${SLURM_JOB_NUM_NODES:?}
hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}") || fail "scontrol does not name the job's nodes"
first=${hosts%%$'\n'*}
ranks=${LLMKD_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
port=${LLMKD_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
say "$nodes nodes of $ranks ranks meet at $first:$port (start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID)"

# Since Slurm 22.05 srun does not take over sbatch's --cpus-per-task, and a node's ranks would share one core.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}

# The number of a node is known on the node alone, so a shell there puts it in. torchrun waits for all nodes before it starts a rank: ten
# minutes, in silence, and then with its own traceback. srun starts them together, and ends all where one can't start.
# shellcheck disable=SC2016
srun --nodes="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
  --nnodes "$nodes" --nproc-per-node "$ranks" --master-addr "$first" --master-port "$port" \
  --shutdown-timeout "${LLMKD_GRACE_SECONDS:-600}" llmkd/train.py "$@" &
step=$!

again= signalled=
stop() {
  signalled=yes
  say "$1: the ranks save and end"
  kill -TERM "$step" 2>/dev/null
}
trap 'stop "told to stop"' TERM INT
trap 'again=yes; stop "the time is nearly over"' USR1

# A signal ends the wait, and not what is waited for.
while :; do
  signalled=
  wait "$step"
  status=$?
  [[ -n $signalled ]] || break
done

if [[ -n $again ]]; then
  say "back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || fail "the job could not be requeued; the same sbatch command goes on from the last checkpoint"
fi
exit "$status"
