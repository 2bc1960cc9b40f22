"""Ranks, collectives and DeepSpeed engines: the only file that imports deepspeed or torch.distributed.

The floors below compute on tensors and know nothing of ranks; what is here is applied to them from outside.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._dynamo  # noqa: F401  (zero.Init patches tensor constructors; dynamo must be imported before it does)
from torch import Tensor, nn

from llmkd.errors import InputError

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns on every rank that it found none

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402

Result = TypeVar("Result")
SPOKEN = "llmkd/spoken"
OFFLOADED = ("param", "optimizer")
RECIPE = "recipe"
"""The value in a ds_configs JSON that the recipe decides."""


@dataclass(frozen=True)
class World:
    """This process among its peers. `control` carries small CPU tensors and objects, so that the device is never waited for."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: Any
    local_size: int
    """Ranks on this machine."""
    timeout: timedelta
    """How long a rank waits for another."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(timeout_seconds: int = 1800) -> World:
    """Join the process group that the launcher (deepspeed, torchrun, llmkd train) described, or make one of a single process."""
    # DeepSpeed looks here for its shared-memory operator alone, which only inference uses; looking it up would compile probes, and
    # building it would ask for a C++ compiler and a minute.
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 (a name its type stubs do not know)
    timeout = timedelta(seconds=timeout_seconds)
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        _share_cores()
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=dist.get_backend(), auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
    control = dist.new_group(backend="gloo", timeout=timeout) if cuda else dist.group.WORLD
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), local_rank, device, control, _local_size(), timeout)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def tell_mistake(sentence: str, patience_seconds: float = 3) -> None:
    """Print the mistake that ends this rank: rank 0 does, another rank only where rank 0 has not met one.

    Launchers end the others at the first exit, so the others wait for rank 0 to speak, and it for them to have heard.
    """
    patience = timedelta(seconds=patience_seconds)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if size == 1:
        if os.environ.get("RANK", "0") == "0":
            print(sentence, file=sys.stderr, flush=True)
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        if rank == 0:
            store.set(SPOKEN, "yes")
            print(sentence, file=sys.stderr, flush=True)
            store.wait([f"{SPOKEN}/{other}" for other in range(1, size)], patience)
        else:
            store.wait([SPOKEN], patience)
            store.set(f"{SPOKEN}/{rank}", "heard")
    except dist.DistError:  # nobody else has met it
        if rank != 0:
            print(sentence, file=sys.stderr, flush=True)


def _share_cores() -> None:
    """Give each rank of a CPU machine its share of the cores; without this every rank starts a thread per core and all crawl."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _local_size()))


def _local_size() -> int:
    """Ranks on this machine, as torchrun (and `llmkd train`) or the deepspeed launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    dist.barrier(group=world.control)


def sum_counts(world: World, counts: list[int]) -> list[int]:
    """Add small integers over the ranks, on the CPU: the device is not waited for."""
    tensor = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(tensor, group=world.control)
    return tensor.tolist()


def sum_tensor(world: World, tensor: Tensor) -> Tensor:
    """Add a device tensor over the ranks."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def all_rows(world: World, rows: Tensor) -> tuple[Tensor, int]:
    """(every rank's rows [N, H] under one another, where this rank's [n, H] begin); no gradient passes. All ranks take part."""
    if world.size == 1:
        return rows.detach(), 0
    counts = sum_counts(world, [len(rows) if rank == world.rank else 0 for rank in range(world.size)])
    mine = rows.new_zeros(max(counts), rows.shape[1])  # a collective moves equal shares
    mine[: len(rows)] = rows.detach()
    shares = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(shares, mine)
    whole = torch.cat([share[:count] for share, count in zip(shares, counts, strict=True)])
    return whole, sum(counts[: world.rank])


def highest(world: World, value: float) -> float:
    """The largest of the ranks' values."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=world.control)
    return tensor.item()


def on_main(world: World, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 while the others wait, and give every rank its result (or its InputError)."""
    answer: list[Any] = [None, None]
    failure: BaseException | None = None
    if world.is_main:
        try:
            answer[0] = work()
        except InputError as error:
            answer[1] = str(error)
        except BaseException as error:  # the other ranks must not wait for ever; raised again below
            failure, answer[1] = error, f"rank 0 failed: {type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=0, group=world.control)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]


# ---------------------------------------------------------------------------------------------------------------------
# From rank to rank


class LostRank(RuntimeError):
    """A rank waited for another that is gone, or that did not answer in time."""


@dataclass(frozen=True)
class Sending:
    """A tensor on its way to or from a member of a wire; it is kept alive until it has been waited for."""

    tensor: Tensor
    said: str
    work: Any

    def wait(self) -> Tensor:
        """The tensor, received (or taken by the other side). Raises LostRank where that does not come about."""
        try:
            self.work.wait()
        except RuntimeError as error:  # gloo and NCCL have no type of error for it
            raise LostRank(f"{self.said}, in vain ({str(error).splitlines()[0]})") from error
        return self.tensor


class Wire:
    """Sends tensors between the members of a group of consecutive ranks, and counts the bytes this one sends.

    In process groups of its own, so that nothing comes between: on NCCL what two ranks send each other must be posted in one order on
    both sides, and collectives of other groups keep theirs.
    """

    def __init__(self, world: World, size: int) -> None:
        self._ranks: list[int] = []
        self._group: Any = None
        self._control: Any = None
        for first in range(0, world.size, size):  # every rank takes part in the making of every group
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks, timeout=world.timeout)
            control = dist.new_group(ranks, timeout=world.timeout, backend="gloo")
            if world.rank in ranks:
                self._ranks, self._group, self._control = ranks, group, control
        self.member = world.rank - self._ranks[0]
        self.size = size
        self.sent_bytes = 0
        self._seconds = int(world.timeout.total_seconds())

    def gather(self, value: Any) -> list[Any]:
        """Every member's small value of CPU tensors and numbers (all take part)."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        dist.all_gather_object(values, value, group=self._control)
        return values

    def post(self, sends: Sequence[tuple[Tensor, int, bool]]) -> list[Sending]:
        """Start to send (True) or receive (False) each tensor to or from a member, all at once. Both sides post in one order."""
        if not sends:
            return []
        posts, said = [], []
        for tensor, member, is_sent in sends:
            rank = self._ranks[member]
            posts.append(dist.P2POp(dist.isend if is_sent else dist.irecv, tensor, rank, self._group))
            verb = "take" if is_sent else "send"
            said.append(f"waited for rank {rank} to {verb} a teacher's state, for up to {self._seconds} s")
            self.sent_bytes += tensor.nbytes if is_sent else 0
        works = dist.batch_isend_irecv(posts)
        if len(works) == 1:  # NCCL makes one of all
            works = works * len(posts)
        return [Sending(s[0], text, work) for s, text, work in zip(sends, said, works, strict=True)]


def lost_rank(error: BaseException) -> bool:
    """Whether an error says that other ranks no longer answer."""
    said = str(error).lower()  # of gloo's own, the one on a timeout does not name it
    return isinstance(error, LostRank | dist.DistError) or "gloo" in said or "pair closure" in said


def silent_ranks(patience_seconds: float = 3) -> list[int]:
    """After a wait in vain: which ranks do not answer a roll call either, most likely the ones that began it.

    This rank's connections are closed first, so that ranks which wait for this one notice, and answer, at once.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + patience_seconds
    silent = []
    try:
        store.set(f"llmkd/answers/{rank}", "yes")
        dist.destroy_process_group()
        for other in set(range(size)) - {rank}:
            left = max(deadline - time.monotonic(), 0.05)
            try:
                store.wait([f"llmkd/answers/{other}"], timedelta(seconds=left))
            except dist.DistStoreError:  # not in time
                silent.append(other)
    except dist.DistNetworkError:  # rank 0, which holds the store, is gone, and nobody else can be asked
        return [0]
    return silent


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed


def load_ds_config(name: str, folder: Path) -> dict[str, Any]:
    """A DeepSpeed configuration by its name in `folder` (ds_configs/) or by a path of the user's own."""
    file = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise InputError(
            f"train.deepspeed: no DeepSpeed configuration {name!r}; write one of {known}, or the path of a .json file"
        )
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not valid JSON at line {error.lineno}: {error.msg}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: a DeepSpeed configuration is a JSON object")
    return config


def complete_ds_config(
    config: dict[str, Any],
    *,
    world_size: int,
    micro_batch: int,
    accumulation: int,
    clip: float,
    dtype: str,
    nvme_path: str,
) -> dict[str, Any]:
    """Write the recipe's numbers into a DeepSpeed configuration. Raises InputError where a number of the user's own disagrees."""
    decided: dict[str, Any] = {
        "train_batch_size": world_size * micro_batch * accumulation,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16.enabled": dtype == "bfloat16",
        "zero_optimization.offload_param.nvme_path": nvme_path,
        "zero_optimization.offload_optimizer.nvme_path": nvme_path,
    }
    completed = json.loads(json.dumps(config))
    for key, value in decided.items():
        *parents, last = key.split(".")
        section = completed
        for parent in parents:
            section = section.get(parent, {}) if key.endswith("nvme_path") else section.setdefault(parent, {})
        found = section.get(last, RECIPE if not key.endswith("nvme_path") else None)
        if found == RECIPE:
            section[last] = value
        elif not key.endswith("nvme_path") and found != value:
            raise InputError(
                f"DeepSpeed configuration: {key} is {found}, the recipe gives {value}; write {RECIPE!r} there, or leave it out"
            )
    if zero_stage(completed) == 0 and dtype == "bfloat16":
        raise InputError(
            "DeepSpeed configuration: without ZeRO (stage 0) DeepSpeed keeps no fp32 gradients of a bfloat16 model; write stage 1, "
            "or train.dtype: float32"
        )
    for section in ("optimizer", "scheduler", "fp16", "amp"):
        if completed.get(section, {}).get("enabled", section in ("optimizer", "scheduler")) and section in completed:
            raise InputError(f"DeepSpeed configuration: {section!r} is the recipe's business (train.*); remove it")
    return completed


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage a DeepSpeed configuration asks for."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def teacher_ds_config(
    micro_batch: int, dtype: str, offload: str, *, block: int, parameter: int, nvme_path: str = ""
) -> dict[str, Any]:
    """ZeRO-3 for a frozen teacher: parameters only, and never more of them gathered than one block, or its embeddings alone.

    `block` and `parameter`: weights of the largest block and of the largest parameter in one. DeepSpeed gathers a module's parameters
    before it runs, lets them go after, and meanwhile fetches ahead until as many are there as `stage3_max_live_parameters` says,
    which the last one fetched may exceed; so the limit is a block less its largest parameter. Its defaults (1e9 live, 5e7 ahead)
    would hold a whole 1B teacher on every rank.
    """
    ahead = max(block - parameter, 1)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": ahead,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": ahead,
        "stage3_param_persistence_threshold": 0,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if offload != "none":
        zero["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
    if offload == "nvme":
        zero["offload_param"] |= {"nvme_path": nvme_path, "buffer_count": 5, "max_in_cpu": 0}
        config["aio"] = {"block_size": 2**20, "queue_depth": 8, "single_submit": False, "overlap_events": True}
    return config


def check_asynchronous_io(key: str) -> None:
    """Build (once per machine) or load what DeepSpeed reads NVMe with. Raises InputError where that is not possible."""
    try:
        deepspeed.ops.op_builder.AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # a missing compiler, header or library, each with an error of its own
        raise InputError(
            f"{key}: nvme needs DeepSpeed's asynchronous I/O, which is compiled on first use and could not be ({_last_line(str(error))}); "
            "install libaio and a C++ compiler (Debian: apt-get install libaio-dev g++ ninja-build), or write cpu"
        ) from error


@contextlib.contextmanager
def sharded_construction(config: dict[str, Any] | None) -> Iterator[None]:
    """Inside, transformers builds and loads a model straight into ZeRO-3 shards, if `config` asks for stage 3."""
    if config is None or zero_stage(config) != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(config)  # transformers holds a weak reference to it
    try:
        yield
    finally:
        del keep


def engine(
    module: nn.Module,
    config: dict[str, Any],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
) -> Any:
    """A DeepSpeed engine that trains `module` with AdamW; vectors (norms, biases) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if full_shape(p).numel() and len(full_shape(p)) > 1],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trained if len(full_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": learning_rate, "betas": betas, "eps": epsilon}
    if config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        if shutil.which(os.environ.get("CXX", "c++")) is None:
            raise InputError(
                "DeepSpeed configuration: an offloaded optimizer is compiled on first use, and there is no C++ compiler; install one "
                "(Debian: apt-get install g++), or use a configuration without offload_optimizer"
            )
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, **options)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    if "nvme" in (config.get("zero_optimization", {}).get(f"offload_{part}", {}).get("device") for part in OFFLOADED):
        check_asynchronous_io("train.deepspeed")
    made, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return made


def frozen_engine(module: nn.Module, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine that only runs `module` forward: shards, no optimizer, no gradients."""
    made, *_ = deepspeed.initialize(model=module.requires_grad_(False), config=config)
    made.eval()
    return made


def on_other_ranks(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of an engine that is to load what another number of ranks saved."""
    if zero_stage(config) == 0:
        return config  # nothing is sharded
    return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}


def merge_shards(shards: Path, whole: Path) -> None:
    """Write a checkpoint's shards as whole tensors, which any number of ranks can load, into a folder of a new folder (rank 0 alone).

    DeepSpeed's own converter, in a process of its own. Without ZeRO there are no shards to merge.
    """
    shutil.rmtree(whole.parent, ignore_errors=True)
    whole.parent.mkdir()
    if not list(shards.glob("*_optim_states.pt")):
        shutil.copytree(shards, whole)
        return
    folders = ["--input_folder", str(shards), "--output_folder", str(whole)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]  # more would hold more of it in memory
    module = "deepspeed.checkpoint.ds_to_universal"
    done = subprocess.run(
        [sys.executable, "-m", module, *folders, *workers, "--inject_missing_state"], capture_output=True, text=True
    )
    if done.returncode:
        shutil.rmtree(whole.parent, ignore_errors=True)
        raise InputError(
            f"{shards}: DeepSpeed could not merge its shards for another number of ranks ({_last_line(done.stderr)}); "
            "go on with the number of ranks that wrote it"
        )


def saved_weights(shards: Path, prefix: str) -> dict[str, Tensor]:
    """The parameters of a checkpoint whose names start with the prefix, which is cut off; float32, on the CPU (any one process).

    The checkpoint's shards are read whole into memory, optimizer states included.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list(shards.glob("*_optim_states.pt")):
        found: Any = get_fp32_state_dict_from_zero_checkpoint(str(shards.parent), tag=shards.name, lazy_mode=True)
    else:  # without ZeRO each rank's file holds whole tensors
        found = torch.load(shards / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    kept = {name: tensor for name, tensor in found.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor.contiguous().float().clone() for name, tensor in kept.items()}


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it gave no reason"])[-1]


def load_shards(engine: Any, folder: Path) -> None:
    """Load what `save_checkpoint` or `merge_shards` wrote (all ranks take part)."""
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise InputError(f"{folder}: DeepSpeed could not load it; remove {folder.parent} to resume from the one before")
    # From whole tensors DeepSpeed gives every group the first one's settings, so that norms would decay, and one tensor as the
    # count of steps, which each group would then count up.
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_count(module: nn.Module) -> int:
    """The number of weights of a module, partitioned or not."""
    return sum(full_shape(p).numel() for p in module.parameters())


def gathered(parameters: Iterable[Tensor | None]) -> contextlib.AbstractContextManager[Any]:
    """Inside, these parameters are whole on every rank (all ranks take part)."""
    sharded = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else contextlib.nullcontext()


@torch.no_grad()
def overwrite(world: World, parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter of an engine another value, the same on every rank: its shards and the optimizer's fp32 copy of them, too."""
    value = value.to(device=world.device, dtype=torch.float32)
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value)
        deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    # DeepSpeed's own setter of a whole parameter fails where ranks don't divide it; shards are of one size, the last filled up.
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    filled = torch.nn.functional.pad(value.flatten(), (0, size * world.size - value.numel()))
    deepspeed.utils.safe_set_local_fp32_param(parameter, filled[world.rank * size : (world.rank + 1) * size])


def whole_state(world: World, module: nn.Module) -> dict[str, Tensor]:
    """The module's weights on rank 0's CPU, gathered one at a time (all ranks take part); empty on the others."""
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            if world.is_main:
                state[name] = parameter.detach().to("cpu", copy=True)
    if world.is_main:
        persistent = module.state_dict().keys()
        state.update(
            {name: value.detach().to("cpu", copy=True) for name, value in module.named_buffers() if name in persistent}
        )
    return state


def quiet() -> None:
    """Keep DeepSpeed's own log to warnings, and its calls of torch's older names out of the user's sight."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
