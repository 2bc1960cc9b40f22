"""Ranks without their imports, which take longer than most runs of the tests: a process imports everything once, and forks each rank.

What is forked has run nothing yet: no thread of torch, no process group, no random number drawn. Each rank has a process of its own to be
forked from, since ranks that were started by themselves also hash their strings differently. The tests of `llmkd train`, of faults and of
studies start their ranks as users do.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

MODULES = (
    "llmkd.train",
    "llmkd.training.write_cache",
    "tests.distributed.runner",
    "tests.distributed.teachers",
    # what a run imports as it goes
    "transformers.models.qwen3.modeling_qwen3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
)


class WarmProcess:
    """A process that forks one rank at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.warm", *MODULES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # so that `kill` reaches the rank too
        )
        self.busy = False

    def start(self, module: str, argument: Path, environment: dict[str, str], log: Path) -> None:
        """Have a fork call the module's `main` with the argument; what it prints goes to the log."""
        assert self._process.stdin is not None
        self.busy = True
        order = {"module": module, "argument": str(argument), "environment": environment, "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def wait(self, timeout: float) -> int:
        """The exit code of the fork, negative for a signal. Raises TimeoutExpired, and has killed it then."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        if not ready:
            self.kill()
            raise subprocess.TimeoutExpired(self._process.args, timeout)
        line = self._process.stdout.readline()
        assert line, f"the process that forks ranks ended with {self._process.wait()}"
        self.busy = False
        return int(line)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End the process and its rank."""
        if not self.ended:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def warm_process(rank: int) -> WarmProcess:
    """The process that forks this rank, started where there is none, and anew where a test has given up waiting for it."""
    process = _processes.get(rank)
    if process is not None and process.busy:
        process.kill()
        process = None
    _processes[rank] = process = process or WarmProcess()
    return process


_processes: dict[int, WarmProcess] = {}


def serve() -> int:
    """Fork a rank for each order on stdin and print its exit code; in a fork, return what `main` makes the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    # here, since these lines are read by the tests' own process too, which needs neither
    import numpy
    import torch

    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # DeepSpeed collects garbage whenever it makes an engine; what is imported is none, and takes most of that time
    for line in sys.stdin:
        order = json.loads(line)
        process = os.fork()
        if process == 0:
            answers.close()
            with open(os.devnull) as nothing, open(order["log"], "w") as log:
                for source, target in ((nothing, 0), (log, 1), (log, 2)):
                    os.dup2(source.fileno(), target)
            os.environ.clear()
            os.environ.update(order["environment"])
            torch.seed()  # like a process that was started by itself, it draws what no other one did (`random` sees to that itself)
            numpy.random.seed()
            importlib.import_module(order["module"]).main(Path(order["argument"]))
            return 0
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
