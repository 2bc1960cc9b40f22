"""How ranks end whose own threads wait where no wait fails, as inside a GPU: by their watches."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from llmkd.distributed import checksums, ending, joining, ranks
from llmkd.errors import FoundByAll, InputError
from llmkd.files import write_text
from tests.distributed.warm import forked

MODULE = "tests.distributed.test_ending"
ANSWER_SECONDS = 60
"""Far less than the ranks' own timeout, with room for a busy machine."""


def main() -> None:
    """A rank of four, of which number 2 ends as the name of the task says, and the others wait where no wait fails."""
    how = Path(sys.argv[1]).name
    ranks.quiet()
    if how == "long work":
        return _work_long(Path(sys.argv[1]))
    world = ranks.start(8 if how == "stands still" else 600)
    ending.start_watch(world.timeout)
    if how == "all is done":
        time.sleep(3 * (world.rank == 1))  # the others wait for it, and miss nobody
        ranks.stop()
        return
    if how.startswith("a common mistake"):
        time.sleep(2 * (how.endswith("late") and world.rank == 2))  # the others have noticed, and ended, by then
        ending.print_mistake("all made it")
        ending.leave(2)
    if world.rank == 2:
        time.sleep(1)
        Path(sys.argv[1]).touch()
        if how == "a mistake of its own":
            ending.print_mistake("it alone made it")
            ending.leave(2)
        os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGSTOP)
    time.sleep(300)


def _work_long(folder: Path) -> None:
    """Rank 0 works for longer than ranks wait for each other, then rank 3 reads its share of a checkpoint for as long."""
    world = ranks.start(6)
    assert ranks.on_main(world, lambda: time.sleep(10) or world.rank) == 0
    checksums.sha256 = lambda file: time.sleep(10 * (world.rank == 3)) or file.name  # type: ignore[assignment]
    ranks.on_main(world, folder.mkdir)
    ranks.on_main(world, lambda: [write_text(folder / f"file{number}", "") for number in range(4)])
    checksums.write_checksums(world, folder)
    ranks.stop()


def _ended(how: str, folder: Path) -> tuple[list[int | None], list[str]]:
    """(each rank's exit code, None of one that stands still; what each says)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"rank{rank}.log" for rank in range(4)]
    processes = [
        forked(MODULE, [str(folder / how)], log, variables={**size, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    stands = how == "stands still"
    codes = [None if stands and rank == 2 else process.wait(timeout=400) for rank, process in enumerate(processes)]
    if stands:
        processes[2].send_signal(signal.SIGKILL)
    if (folder / how).is_file():
        assert time.time() - (folder / how).stat().st_mtime < ANSWER_SECONDS
    return codes, [log.read_text() for log in logs]


@pytest.mark.parametrize("how", ["is killed", "stands still", "a mistake of its own"])
def test_all_name_the_rank_that_is_lost_and_end(how: str, tmp_path: Path) -> None:
    """Its neighbours notice at once, the others when these let go of the watches' connections: none is named for being slow."""
    codes, said = _ended(how, tmp_path)
    assert codes == [1, 1, {"is killed": -9, "a mistake of its own": 2}.get(how), 1], said
    for rank in (0, 1, 3):
        [sentence] = [line for line in said[rank].splitlines() if line.startswith("Error: ")]
        wanted = (
            rf"Error: rank {rank}: lost touch with the other ranks \(.+\); silent ranks: 2\. The same command resumes"
        )
        assert re.match(wanted, sentence), said
    assert ("Error: it alone made it" in said[2]) == (how == "a mistake of its own")


@pytest.mark.parametrize(("how", "code"), [("all is done", 0), ("a common mistake", 2), ("a common mistake, late", 2)])
def test_ranks_that_end_together_miss_nobody(how: str, code: int, tmp_path: Path) -> None:
    codes, said = _ended(how, tmp_path)
    assert codes == [code] * 4, said
    assert "".join(said).count("Error: ") == how.startswith("a common mistake") and "silent" not in "".join(said), said


def test_a_store_that_is_gone_tells_nothing_and_prints_nothing(
    world: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rank 0, which holds it, was killed between the failed wait and the question."""

    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Failed to recv, got 0 bytes")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Gone)
    assert not ending._is_told()
    assert capfd.readouterr() == ("", "")


def test_work_of_one_rank_may_outlast_the_others_patience(tmp_path: Path) -> None:
    """As the merging of shards, an export and the hashing of a checkpoint do, of a large model."""
    codes, said = _ended("long work", tmp_path)
    assert codes == [0] * 4, said
    sums = json.loads((tmp_path / "long work" / checksums.FILE).read_text())
    assert sums == {f"file{number}": f"file{number}" for number in range(4)}


def test_nccl_waits_longer_than_ranks_do_so_that_they_are_named_first(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = timedelta(seconds=60)
    assert joining.patience("gloo", own) == own < joining.patience("nccl", own)
    # DeepSpeed's groups have torch's default, whose ten minutes are not the recipe's
    nccl: Any = "nccl"
    assert dist.distributed_c10d._get_default_timeout(nccl) == joining.patience("nccl", world.timeout)


def test_a_rank_ends_without_taking_the_process_group_down(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With work left on a GPU that would wait for the lost rank."""
    monkeypatch.setattr(dist, "destroy_process_group", lambda *_: pytest.fail("taken down"))
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(ending, "_ending", ending.threading.Event())
    ending.end_lost(RuntimeError("[pair.cc:553] Connection closed by peer\nmore"))
    assert left == [1] and ending._ending.is_set()


@pytest.mark.parametrize(
    ("nccl", "gloo"),
    [
        ("eth0", "eth0"), ("ib", "ib0"), ("=eth0", "eth0"), ("=eth", None), ("^docker0,lo", None), ("wlan,eth", "eth0"),
        ("eth1:9000", "eth1"), ("nothing", None),
    ],
)  # fmt: skip
def test_gloo_takes_the_interface_that_nccl_was_given(nccl: str, gloo: str | None) -> None:
    assert joining.gloo_interface(nccl, ["lo", "docker0", "eth0", "eth1", "ib0"]) == gloo


@pytest.mark.parametrize(("given", "found"), [({}, "lo"), ({"GLOO_SOCKET_IFNAME": "mine"}, "mine")])
def test_what_the_user_gave_gloo_is_kept(given: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for name, value in {"NCCL_SOCKET_IFNAME": "lo", **given}.items():
        monkeypatch.setenv(name, value)
    joining._share_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == found


def test_a_mistake_of_rank_0_alone_reaches_the_caller_as_before(world: Any) -> None:
    with pytest.raises(FoundByAll, match="no rows"):
        ranks.on_main(world, lambda: (_ for _ in ()).throw(InputError("no rows")))
