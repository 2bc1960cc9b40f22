"""Processes that are started by the server or by themselves: files, signals, exit codes, and what is left when one of them is killed."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmkd import starting
from llmkd.forkserver import Order
from llmkd.starting import Process, Server, environment, start

MODULE = "tests.unit.test_starting"
PATIENCE = 60


def main() -> int | None:
    """Of a started process: what its first argument says."""
    task, *arguments = sys.argv[1:]
    if task == "tell":
        print(
            json.dumps(
                {"arguments": arguments, "rank": os.environ.get("RANK"), "cwd": os.getcwd(), "read": sys.stdin.read()}
            )
        )
        print("an error", file=sys.stderr)
    elif task == "return":
        return int(arguments[0])
    elif task == "exit":
        sys.exit(arguments[0])
    elif task == "raise":
        raise ValueError("what is wrong")
    elif task == "stop":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        ready(arguments[0])
    elif task == "sleep":
        ready(arguments[0])
    elif task == "family":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=subprocess.DEVNULL)
        ready(arguments[0])
    elif task == "ask":  # a study, say: it asks for a process and waits
        starting.IMPORTS, starting.can_fork = (), lambda: True  # quickly
        asked, _ = _started(lambda: start(MODULE, ["sleep", arguments[0]], {}, name="asked"), Path(arguments[0]))
        assert asked.poll() is None
        ready(arguments[0] + ".asks")
    return None


def ready(file: str) -> None:
    Path(file).write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(600)


def _started(begin: Callable[[], Process], file: Path) -> tuple[Process, list[int]]:
    """(a process that has told it is ready, its number and its parent's)."""
    process = begin()
    return process, _told(file)


def _told(file: Path) -> list[int]:
    wait_for(lambda: file.is_file() and file.read_text().count(" "))
    return [int(number) for number in file.read_text().split()]


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(params=["server", "interpreter"])
def begin(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Process]:
    """`start` for this file's `main`, in both ways."""
    monkeypatch.setattr(starting, "IMPORTS", ())  # a server that is quick to start
    monkeypatch.setattr(starting, "_server", None)
    monkeypatch.setattr(starting, "can_fork", lambda: request.param == "server")

    def begin(*arguments: object, variables: dict[str, str] | None = None, **options: object) -> Process:
        values = {"RANK": "3", **(variables or {})}
        return start(MODULE, [str(value) for value in arguments], values, name="test", **options)  # type: ignore[arg-type]

    return begin


def test_a_process_has_its_files_arguments_and_variables(
    begin: Callable[..., Process], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").write_text("asked")
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "in").open() as read, (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        files = (read.fileno(), out.fileno(), err.fileno())
        assert begin("tell", "a b", "", files=files).wait(PATIENCE) == 0
    told = json.loads((tmp_path / "out").read_text())
    assert told == {"arguments": ["a b", ""], "rank": "3", "cwd": str(tmp_path), "read": "asked"}
    assert (tmp_path / "err").read_text() == "an error\n"


def test_exit_codes_are_those_of_python(begin: Callable[..., Process], tmp_path: Path) -> None:
    with (tmp_path / "err").open("w") as err:
        files = (0, err.fileno(), err.fileno())
        processes = [begin(*task, files=files) for task in (("return", 0), ("return", 5), ("exit", "said"), ("raise",))]
        assert [process.wait(PATIENCE) for process in processes] == [0, 5, 1, 1]
    said = (tmp_path / "err").read_text()
    assert "said\n" in said and "ValueError: what is wrong" in said
    assert [process.poll() for process in processes] == [0, 5, 1, 1], "asked again, it says the same"


def test_signals_reach_a_process_and_are_told(begin: Callable[..., Process], tmp_path: Path) -> None:
    heeding, _ = _started(lambda: begin("stop", tmp_path / "heeding"), tmp_path / "heeding")
    plain, _ = _started(lambda: begin("sleep", tmp_path / "plain"), tmp_path / "plain")
    assert heeding.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        heeding.wait(0.01)
    heeding.send_signal(signal.SIGTERM)
    assert heeding.wait(PATIENCE) == 7
    assert plain.poll() is None, "the other one got no signal"
    plain.send_signal(signal.SIGTERM)
    assert plain.wait(PATIENCE) == -signal.SIGTERM
    plain.send_signal(signal.SIGKILL)  # to one that has ended: nothing


def test_a_group_is_killed_as_a_whole_and_one_that_is_stopped_too(
    begin: Callable[..., Process], tmp_path: Path
) -> None:
    file = tmp_path / "family"
    process, (number, _) = _started(lambda: begin("family", file, group=True), file)
    (child,) = map(int, Path(f"/proc/{number}/task/{number}/children").read_text().split())
    os.kill(number, signal.SIGSTOP)
    process.send_signal(signal.SIGKILL)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    wait_for(lambda: not is_alive(child))


def test_a_process_ends_with_the_one_that_asked_for_it_however_that_ends(
    begin: Callable[..., Process], tmp_path: Path
) -> None:
    """Of three, one after the other asked for by the one before, the middle one is killed."""
    file = tmp_path / "asked"
    middle, (asking, _) = _started(lambda: begin("ask", file), Path(f"{file}.asks"))
    asked, parent = _told(file)
    assert asking not in (asked, parent), "the asked one comes from a server"
    os.kill(asked, signal.SIGSTOP)
    os.kill(asking, signal.SIGKILL)
    assert middle.wait(PATIENCE) == -signal.SIGKILL
    wait_for(lambda: not is_alive(asked) and not is_alive(parent))


def _quick(imports: tuple[str, ...] = ()) -> Server:
    return Server(environment(), imports)


def _order(*arguments: str) -> Order:
    return Order(MODULE, list(arguments), {}, os.getcwd(), "test", group=False)


FILES = (0, 1, 2)


def test_a_server_says_whether_it_still_imports() -> None:
    server = _quick()
    assert server.is_importing
    while server.is_importing:
        time.sleep(0.01)
    assert not server.ended
    server.kill()
    assert not server.is_importing


def test_a_killed_server_takes_its_processes_along_and_they_count_as_killed(tmp_path: Path) -> None:
    server, file = _quick(), tmp_path / "number"
    process, (number, parent) = _started(lambda: server.start(_order("sleep", str(file)), FILES), file)
    assert parent == server.process.pid
    server.process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    wait_for(lambda: not is_alive(number))
    assert server.start(_order("return", "0"), FILES).wait(PATIENCE) == -signal.SIGKILL
    assert not server.fits(environment())


def test_a_server_is_not_ended_by_what_ends_its_processes(tmp_path: Path) -> None:
    """Ctrl-C in a terminal, or a cluster's SIGTERM to all of a job: the ranks save, and are waited for."""
    server, file = _quick(), tmp_path / "number"
    process, (number, _) = _started(lambda: server.start(_order("stop", str(file)), FILES), file)
    for sent in (signal.SIGINT, signal.SIGTERM):
        server.process.send_signal(sent)
    os.kill(number, signal.SIGTERM)
    assert process.wait(PATIENCE) == 7
    other, (number, _) = _started(
        lambda: server.start(_order("sleep", str(tmp_path / "other")), FILES), tmp_path / "other"
    )
    os.kill(number, signal.SIGINT)  # in a fork Python's own handler is back
    assert other.wait(PATIENCE) == -signal.SIGINT
    server.kill()


def test_a_stop_does_not_wait_for_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    server = _quick(("slow_import",))
    process = server.start(_order("return", "0"), FILES)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == -signal.SIGTERM


def test_a_signal_that_comes_too_late_does_not_hide_the_exit_code(tmp_path: Path) -> None:
    server, file = _quick(), tmp_path / "number"
    process, (number, _) = _started(lambda: server.start(_order("stop", str(file)), FILES), file)
    server.process.send_signal(signal.SIGSTOP)  # so that it finds both at once, the end and the signal
    os.kill(number, signal.SIGTERM)
    wait_for(lambda: not is_alive(number))
    process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 7
    server.kill()


def test_a_server_that_can_not_import_fails_what_is_asked_of_it() -> None:
    server = _quick(("llmkd.no_such_module",))
    assert server.start(_order("return", "0"), FILES).wait(PATIENCE) == 1


def test_a_process_that_nobody_waits_for_any_more_is_killed_and_the_server_ends_after_the_last(tmp_path: Path) -> None:
    server = _quick()
    left, (number, _) = _started(
        lambda: server.start(_order("sleep", str(tmp_path / "left")), FILES), tmp_path / "left"
    )
    kept, _ = _started(lambda: server.start(_order("stop", str(tmp_path / "kept")), FILES), tmp_path / "kept")
    del left
    wait_for(lambda: not is_alive(number))
    server.close()
    time.sleep(0.2)
    assert not server.ended and kept.poll() is None
    kept.send_signal(signal.SIGTERM)
    assert kept.wait(PATIENCE) == 7
    assert server.process.wait(PATIENCE) == 0


def test_one_server_serves_until_the_environment_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what its own imports have set to the same, as they do in this process."""
    (tmp_path / "sets_a_variable.py").write_text("import os; os.environ['LLMKD_TEST_IMPORTED'] = 'yes'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(starting, "IMPORTS", ("sets_a_variable",))
    monkeypatch.setattr(starting, "_server", None)
    first = starting.server()
    monkeypatch.setenv("RANK", "5")  # what this process is to a launcher, its own processes are not
    assert starting.server() is first
    monkeypatch.setenv("LLMKD_TEST_IMPORTED", "yes")
    assert starting.server() is first
    monkeypatch.setenv("LLMKD_TEST_IMPORTED", "no")
    second = starting.server()
    assert second is not first
    first.process.wait(PATIENCE)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert starting.server() is not second


@pytest.mark.slow
def test_a_studys_own_imports_change_no_variable_of_the_servers() -> None:
    """With another environment it would be started anew, and import it all again before the first step."""
    code = (
        "import importlib, os, sys\n"
        "for module in sys.argv[1:]: importlib.import_module(module)\n"
        "before = dict(os.environ)\n"
        "import llmkd.study, lm_eval.tasks, lm_eval.api.metrics\n"
        "print(sorted(os.environ.items() - before.items()))"
    )
    command = [sys.executable, "-c", code, *starting.IMPORTS]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_other_variables_than_a_launchers_take_an_interpreter_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CUDA_VISIBLE_DEVICES, say: what the server has imported may have read it."""
    monkeypatch.setattr(starting, "server", lambda: pytest.fail("it may not be forked"))
    assert start(MODULE, ["return", "4"], {"CUDA_VISIBLE_DEVICES": "1"}, name="test").wait(PATIENCE) == 4


def test_where_a_gpu_is_seen_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(starting, "server", lambda: pytest.fail("it may not be forked"))
    starting.get_ready()
    assert start(MODULE, ["return", "4"], {}, name="test").wait(PATIENCE) == 4


def test_the_environment_is_no_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "LLMKD_RUNS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen = environment()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "LLMKD_RUNS"} & set(seen)
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["OMP_WAIT_POLICY"] == "PASSIVE", "waiting threads leave the cores to others"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert environment()["OMP_WAIT_POLICY"] == "ACTIVE", "but as the user says, where the user says"
    assert seen.get("HF_HUB_OFFLINE") == os.environ.get("HF_HUB_OFFLINE")


if __name__ == "__main__":
    sys.exit(main())


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as a busy server has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("the system allows no more than 1024 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_is_waited_for_where_many_files_are_open(many_files: None) -> None:
    """`select` refuses descriptors from 1024 on."""
    ours, theirs = socket.socketpair()
    with theirs, socket.socket(fileno=fcntl.fcntl(ours, fcntl.F_DUPFD, 1500)) as ours_again:
        ours.close()
        assert ours_again.fileno() >= 1500
        assert not starting._is_readable(ours_again, 0) and not starting._is_readable(ours_again, 0.01)
        theirs.send(b"0")
        assert starting._is_readable(ours_again, 0) and starting._is_readable(ours_again, None)
