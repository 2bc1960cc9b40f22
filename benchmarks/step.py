"""A training step of llmkd beside the compute that no method can do without, the plain way, TRL's trainers and the paper's loss.

python -m benchmarks.step --size small                    (one process; a table in a few minutes)
python -m benchmarks.step --size tiny --ranks 2 --profile
python -m benchmarks.step --blocks plain --blocks compiled --blocks liger    (one after another, each in a process of its own)
"""

from __future__ import annotations

import gc
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import transformers
from transformers import Qwen3Config

from benchmarks import tables, trl_trainers
from benchmarks.block_forms import FORMS, alone
from benchmarks.check import agrees, expected_losses
from benchmarks.contestants import Contestant, SharedEngine, Terms, chosen, make_passes, share_engine
from benchmarks.measure import Memory, bytes_up_to_backward, mean_loss, memory, rounds
from benchmarks.passes import CHUNK, Llmkd
from benchmarks.phases import operations_of, phases_of
from benchmarks.shapes import SIZES, Size, Work, make_model, make_work
from llmkd.distributed.ds_configs import complete_ds_config, load_ds_config, zero_stage
from llmkd.distributed.ranks import World, quiet, start, stop
from llmkd.errors import InputError
from llmkd.files import ROOT
from llmkd.layer_map import forward
from llmkd.models.compiled_blocks import compile_blocks
from llmkd.models.liger import check_liger, use_kernels
from llmkd.models.load import DTYPES
from llmkd.models.parts import blocks as blocks_of
from llmkd.provenance import commit, hardware, versions

SECTION = "A training step"
BATCHES = 4
"""Different micro-batches, used in turn."""
PROFILED = ("unavoidable", "llmkd/none", "llmkd/forward", "llmkd/none kl alone", "plain", "trl/gkd", "trl/distillation")


class Benchmark:
    """Models, micro-batches and contestants of one run. `problems` says who could not take part, or whose loss is another."""

    def __init__(
        self,
        world: World,
        size: Size,
        dtype: torch.dtype,
        ds_name: str,
        only: tuple[str, ...],
        memory_rows: int,
        blocks: str = "plain",
    ) -> None:
        self._compiles = "compiled" in blocks
        if "liger" in blocks:
            check_liger([Qwen3Config()], gpu=world.device.type == "cuda")
            use_kernels("liger", [Qwen3Config()])
        self.world, self.size, self.dtype = world, size, dtype
        self.works = make_work(size, rank=world.rank, ranks=world.size, count=BATCHES, device=world.device)
        self.ds_config = complete_ds_config(
            load_ds_config(ds_name, ROOT / "ds_configs"),
            world_size=world.size,
            micro_batch=size.rows,
            accumulation=1,
            clip=1.0,
            dtype={v: k for k, v in DTYPES.items()}[dtype],
            nvme_path="/tmp",
        )
        # A peak of memory is asked for where logits are large, so more tokens than the clock has patience for.
        longer = replace(size, rows=size.rows * memory_rows)
        self.large = make_work(longer, rank=world.rank, ranks=world.size, count=1, device=world.device)[0]
        limit_buckets(self.ds_config, size)
        self.lead = 1 if zero_stage(self.ds_config) == 3 else 0
        self.problems: list[str] = []
        wanted = chosen(only)
        self.teacher = self._model(size.teacher_blocks, seed=1)
        self.teacher.eval().requires_grad_(False)
        student = self._model(size.student_blocks, seed=2)
        passes = make_passes(student, self.teacher, ranks=world.size, wanted=wanted)
        pairs = forward(size.student_blocks, size.teacher_blocks)
        counted = range(len(pairs) + 1) if wanted("pairs") else ()
        for count in counted:
            terms = Terms(pairs=pairs[:count])
            passes[f"pairs/{count}"] = (terms, Llmkd(student, self.teacher, terms.pairs, ranks=world.size))
        given = [terms for terms, _ in passes.values() if terms is not None]
        alone = [trl_trainers.KL_ALONE]
        self._expected = dict(zip(map(repr, [*given, *alone]), self._expect(student, [*given, *alone]), strict=True))
        for model in (student, self.teacher):
            self._compile(model)  # by now the losses that the plain blocks give are known
        shared = share_engine(student, self.teacher, passes, self.ds_config) if passes else []
        self.counted: list[SharedEngine] = [c for c in shared if c.name.startswith("pairs/")]
        self.contestants: list[Contestant] = [c for c in shared if not c.name.startswith("pairs/")]
        self._add_trl([kind for kind in trl_trainers.kinds(world.device) if wanted(kind)])

    def _model(self, blocks: int, *, seed: int) -> Any:
        return make_model(self.size, blocks, self.dtype, self.world.device, seed=seed)

    def _compile(self, model: Any) -> None:
        if self._compiles:
            compile_blocks(blocks_of(model))

    def _expect(self, student: Any, terms: list[Terms]) -> list[float]:
        return expected_losses(self.world, student, self.teacher, self.works[0], terms)

    def _add_trl(self, kinds: list[str]) -> None:
        if kinds and trl_trainers.version() is None:
            self.problems.append(f"{', '.join(kinds)}: TRL is not installed; run pip install -e '.[bench]'")
            return
        for kind in kinds:
            student = self._model(self.size.student_blocks, seed=2)
            self._compile(student)
            self.contestants.append(
                trl_trainers.TrlStep(kind, self.world, student, self.teacher, self.ds_config, self.works[0])
            )

    def check(self) -> list[list[str]]:
        """One step each, which also warms up: (name, loss, what it must be). The rates of learning are 0: nothing has moved."""
        rows = []
        for contestant in [*self.contestants, *self.counted]:
            with contestant.turn() as step:
                loss = mean_loss(self.world, step(self.works[0]))
            if contestant.terms is None:
                rows.append([contestant.name, f"{loss:.5f}", "by its own definition"])
                continue
            expected = self._expected[repr(contestant.terms)]
            rows.append([contestant.name, f"{loss:.5f}", f"{expected:.5f}"])
            if not agrees(contestant.name, loss, expected, self.dtype):
                self.problems.append(f"{contestant.name}: its loss is {loss:.5f}, not {expected:.5f}")
        return rows

    def speed(self, repeat: int) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
        """(seconds, tokens) of each round, by name."""
        seconds = rounds(self.world, self.contestants, self.works, repeat=repeat, lead=self.lead)
        tokens = [self.works[number % len(self.works)].attended for number in range(repeat)]
        return seconds, {name: tokens for name in seconds}

    def bytes(self) -> dict[str, Memory]:
        """The memory of each contestant's step."""
        return {c.name: memory(self.world, c, self.large) for c in self.contestants}

    def pairs_table(self) -> str:
        """What each further matched pair adds, in tensors of one state."""
        state = self.large.batch.input_ids.numel() * self.size.hidden * self.dtype.itemsize
        found = [bytes_up_to_backward(self.world, c, self.large) for c in self.counted]
        rows = []
        for number, (peak, waiting) in enumerate(found):
            added = ["", ""]
            if number:
                added = [
                    f"{(now - then) / state:+.2f}" for now, then in zip((peak, waiting), found[number - 1], strict=True)
                ]
            rows.append([str(number), f"{peak / 2**20:.2f}", added[0], f"{waiting / 2**20:.2f}", added[1]])
        header = ["pairs", "peak, MiB", "added, [B, T, H]", "waiting for the backward pass, MiB", "added, [B, T, H] "]
        return tables.table(header, rows)

    def profile(self, trace: Path | None) -> str:
        """Phases of some contestants, and the longest operations of each."""
        phases, sent, operations = {}, {}, []
        for contestant in self.contestants:
            if contestant.name not in PROFILED:
                continue
            phases[contestant.name] = phases_of(contestant, self.works[0])
            file = None if trace is None else trace / f"{contestant.name.replace('/', '-')}-{self.world.rank}.json"
            longest, sent[contestant.name] = operations_of(self.world, contestant, self.works[0], trace=file)
            operations.append(f"{contestant.name}\n{longest}")
        if not phases:
            return ""
        return tables.phase_table(phases, sent) + "\n\n" + "\n".join(f"```\n{text}\n```" for text in operations)


def limit_buckets(ds_config: dict[str, Any], size: Size) -> None:
    """Let the buckets in which gradients and weights are sent hold a block: 2e8 numbers would hide all else of a small model."""
    zero = ds_config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        if key in zero:
            zero[key] = min(zero[key], size.block_parameters)


def flops(size: Size, work: Work) -> float:
    """Floating-point operations of the unavoidable products of one whole batch: weights, attention's scores, logits."""
    scores = sum((len(r.prompt) + len(r.completion)) ** 2 for r in work.rows) / sum(map(_length, work.rows))
    attention = 2 * scores * size.heads * size.head_dim  # two products, half of each masked
    block = 2 * size.block_parameters + attention
    body = work.attended * block * (size.teacher_blocks + 3 * size.student_blocks)
    logits = work.trained * 2 * size.hidden * size.vocabulary * (1 + 3)
    return body + logits


def _length(row: Any) -> int:
    return len(row.prompt) + len(row.completion)


def sized(size: Size, tokens: int | None) -> Size:
    """The size with as many rows, and if need be as long ones, as `tokens` per rank and micro-batch ask for (padding included)."""
    if tokens is None:
        return size
    if tokens < 8:
        raise InputError(f"--tokens {tokens}: write at least 8, tokens of one rank's micro-batch, padding included")
    return replace(size, rows=max(1, tokens // size.longest), longest=min(size.longest, tokens))


def facts(bench: Benchmark, command: str, ds_name: str) -> str:
    """What was run, on what, from which commit."""
    size, work, machine = bench.size, bench.works[0], hardware()
    trained = sum(w.trained for w in bench.works) / sum(w.attended for w in bench.works)
    padding = 1 - work.batch.attended.float().mean().item()
    made = versions("torch", "deepspeed", "transformers", "accelerate", "trl")
    return "\n".join(
        [
            f"- command: `{command}`",
            f"- hardware: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
            f"GPUs: {', '.join(machine['gpus']) or 'none'}; load at the start {os.getloadavg()[0]:.1f}",
            f"- commit: {commit()}; {', '.join(f'{name} {version}' for name, version in made.items())}",
            f"- models: Qwen3-shaped, width {size.hidden}, {size.teacher_blocks} -> {size.student_blocks} blocks, vocabulary "
            f"{size.vocabulary}, head {'tied' if size.tied else 'untied'}, {str(bench.dtype).removeprefix('torch.')}, random weights",
            f"- work: {bench.world.size} ranks x {size.rows} rows of {size.longest // 2} to {size.longest} tokens; {work.attended} tokens "
            f"in the first batch, {trained:.0%} of all tokens trained, {padding:.0%} padding; DeepSpeed `{ds_name}` with buckets of a "
            f"block, chunks of {CHUNK}",
        ]
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--ranks", default=1, show_default=True, help="Processes on this machine.")
@click.option("--size", type=click.Choice(list(SIZES)), default="small", show_default=True)
@click.option(
    "--tokens", type=int, help="Tokens of one rank's micro-batch, padding included [default: the size's own]."
)
@click.option("--repeat", default=5, show_default=True, help="Timed rounds.")
@click.option("--only", multiple=True, help="Contestants whose name begins so; pairs: the table of matched pairs.")
@click.option(
    "--deepspeed", "ds_name", default="zero2", show_default=True, help="A name in ds_configs/, or a JSON file."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--memory-rows", default=2, show_default=True, help="Bytes are counted on so many times the rows.")
@click.option("--profile", "profiled", is_flag=True, help="Say where the time goes.")
@click.option(
    "--trace", type=click.Path(path_type=Path), help="With --profile: the folder for torch.profiler's traces."
)
@click.option("--peak-tflops", type=float, help="The hardware's peak per rank; prints the share that is used (MFU).")
@click.option(
    "--blocks",
    type=click.Choice(FORMS),
    multiple=True,
    default=("plain",),
    show_default=True,
    help="How everybody's blocks are computed: as train.compile and train.kernels say it.",
)
@click.option("--write", is_flag=True, help="Put the tables into benchmarks/RESULTS.md.")
def main(
    ranks: int, size: str, tokens: int | None, repeat: int, only: tuple[str, ...], ds_name: str, dtype: str,
    memory_rows: int, profiled: bool, trace: Path | None, peak_tflops: float | None, blocks: tuple[str, ...], write: bool,
) -> None:  # fmt: skip
    """Time a training step of llmkd and of its alternatives side by side, and count the bytes it makes."""
    if len(blocks) > 1:
        sys.exit(max(alone(sys.argv[1:], form) for form in blocks))
    if ranks > 1 and "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "benchmarks.step"]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv[1:]])
    quiet()
    transformers.utils.logging.set_verbosity_error()
    world = start()
    try:
        bench = Benchmark(world, sized(SIZES[size], tokens), DTYPES[dtype], ds_name, only, memory_rows, *blocks)
        said = [facts(bench, f"python -m benchmarks.step {shlex.join(sys.argv[1:])}", ds_name)]
        _tell(
            world,
            f"{len(bench.contestants) + len(bench.counted)} contestants are set up; a step each, its loss checked",
        )
        losses = bench.check()
        _tell(world, f"{repeat} timed rounds")
        seconds, token_counts = bench.speed(repeat) if bench.contestants else ({}, {})
        _tell(world, "counting bytes")
        bytes_of = bench.bytes()
        if seconds:
            said += ["**Speed.** Median (range) over the rounds; ratios round by round, above 1 is faster.",
                     tables.speed_table(seconds, token_counts)]  # fmt: skip
            said += [
                f"**Memory.** MiB on one rank, {bench.large.batch.input_ids.numel()} tokens with padding: tensors made in a step, at most "
                "alive at a time, and what is there before and after it; "
                "exact bytes but for the last column.",
                tables.memory_table(bytes_of),
            ]
        if "unavoidable" in seconds:
            said.append(_utilisation(bench, median(seconds["unavoidable"]), peak_tflops))
        if bench.counted:
            said += ["**Matched pairs.** Forward and backward passes of llmkd.", bench.pairs_table()]
        if profiled:
            _tell(world, "profiling")
            said += ["**Profile.**", bench.profile(trace)]
        said += ["**Losses** of the first batch, and what they must be by their definitions in fp32.",
                 tables.table(["step", "loss", "must be"], losses)]  # fmt: skip
        said += ["**Goals.**", "\n".join(tables.goals(seconds, bytes_of) or ["none that these contestants could show"])]
        said += [f"**Problem**: {problem}" for problem in bench.problems]
        if world.is_main:
            report = "\n\n".join(said)
            print(report, flush=True)
            if write:
                how = "".join(f", {form} blocks" for form in blocks if form != "plain")
                _write(f"{size}, {world.size} {'rank' if world.size == 1 else 'ranks'}, {ds_name}{how}", report)
        failed = any("its loss is" in problem for problem in bench.problems)
        del bench
        gc.collect()
    finally:
        stop()
    sys.exit(1 if failed else 0)


def _tell(world: World, what: str) -> None:
    if world.is_main:
        print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)


def _utilisation(bench: Benchmark, seconds: float, peak_tflops: float | None) -> str:
    work = flops(bench.size, bench.works[0]) / seconds / 1e12 / bench.world.size
    share = "" if peak_tflops is None else f", {work / peak_tflops:.1%} of {peak_tflops:g}"
    return f"The unavoidable step computes at {work:.3f} TFLOP/s per rank{share}."


def _write(title: str, report: str) -> None:
    text = tables.RESULTS.read_text() if tables.RESULTS.is_file() else "# Benchmarks\n"
    tables.RESULTS.write_text(tables.put(text, SECTION, title, report))


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        print(f"Error: {error.format_message() if isinstance(error, click.ClickException) else error}", file=sys.stderr)
        sys.exit(2)
