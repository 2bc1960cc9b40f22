"""What is in a cache's folder and what is left to do there, checked before the teacher is loaded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkd.errors import InputError
from llmkd.recipe.recipe import Recipe
from llmkd.teachers import cache_files
from llmkd.teachers.cache_files import Contents, Manifest, Shard
from llmkd.training import cache_contents

log = logging.getLogger("llmkd")

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What to write where: the row ranges of all shards, and the numbers of the missing ones."""

    folder: Path
    contents: Contents
    ranges: list[tuple[int, int]]
    left: list[int]


def prepare(recipe: Recipe, wanted: Contents, lengths: Sequence[int], *, trusted: bool) -> Plan:
    """What is left to write (rank 0 alone); the size is logged. Raises InputError for another cache in the folder or a full disk."""
    folder = recipe.cache_folder
    if not cache_files.sizes(wanted):
        raise InputError(
            "loss: neither kl nor hidden needs the teacher, so there is nothing to cache; give one of them a weight"
        )
    whole = _whole(recipe, wanted, trusted=trusted)
    if whole is not None:
        return Plan(folder, whole, [], [])
    under_way = cache_files.read_plan(folder)
    if under_way is not None:  # it may hold more than is wanted
        _check_serves(folder, under_way[0], wanted)
    bytes_per_token = -(-sum(cache_files.sizes(wanted).values()) // wanted.tokens)
    new_ranges = cache_files.shard_ranges(lengths, bytes_per_token, int(recipe.cache.shard_mib * 2**20))
    contents, ranges = under_way or (wanted, new_ranges)
    if under_way is None:
        _remove_unknown(folder)
    done = _done(folder, len(ranges))
    _log_size(folder, contents, len(done), sum(shard.tokens for shard in done.values()))
    if under_way is None:
        folder.mkdir(parents=True, exist_ok=True)
        cache_files.write_plan(folder, contents, ranges)
    return Plan(folder, contents, ranges, [number for number in range(len(ranges)) if number not in done])


def _whole(recipe: Recipe, wanted: Contents, *, trusted: bool) -> Contents | None:
    """What the folder's whole cache holds; None where there is none. A cache with damaged shards is reopened without them."""
    folder = recipe.cache_folder
    manifest = cache_files.read_manifest(folder)
    if manifest is None:
        return None
    _check_serves(folder, manifest.contents, wanted)
    bad = _damaged(recipe, manifest, trusted=trusted)
    if not bad:
        return manifest.contents
    cache_files.reopen(folder, manifest, bad)
    return None


def _damaged(recipe: Recipe, manifest: Manifest, *, trusted: bool) -> list[Shard]:
    """The shards that must be written again; the reason for each is logged."""
    hashed = not trusted or cache_contents.verifies_at_start(recipe, manifest)
    if hashed:
        size = sum(shard.bytes for shard in manifest.shards)
        log.info("cache: comparing all %.3f GiB of %s with their checksums", size / GIB, recipe.cache_folder)
    bad = cache_contents.damaged(recipe.cache_folder, manifest, hashed=hashed)
    for shard, what in bad:
        log.info("cache: %s %s, and is written again", shard.file, what)
    return [shard for shard, _ in bad]


def _done(folder: Path, shards: int) -> dict[int, Shard]:
    """Number -> record of the shards that are published."""
    records = {number: cache_files.record(cache_files.shard_file(folder, number)) for number in range(shards)}
    return {number: shard for number, shard in records.items() if shard is not None}


def _remove_unknown(folder: Path) -> None:
    """Remove shards of which nothing says any more what they were made of."""
    unknown = sorted(folder.glob("shard-*.safetensors*"))
    if unknown:
        log.warning(
            "cache: %s holds %d shards and no plan.json that says what of; they are written again", folder, len(unknown)
        )
    for file in [*unknown, *folder.glob("shard-*.json")]:
        file.unlink()


def _check_serves(folder: Path, have: Contents, wanted: Contents) -> None:
    """Raise InputError where a folder holds another cache than the wanted one, which is never overwritten."""
    why = cache_files.unfit(have, wanted)
    if why is not None:
        raise InputError(
            f"the teacher's cache {folder} {why}; put the recipe back, remove that folder, or set cache.path"
        )


def _log_size(folder: Path, wanted: Contents, shards_done: int, tokens_done: int) -> None:
    """Log what the cache will take. Raises InputError where the disk has not so much left."""
    sizes = cache_files.sizes(wanted)
    total = sum(sizes.values())
    log.info("cache: %s rows, %s tokens, in %s", f"{wanted.rows:,}", f"{wanted.tokens:,}", folder)
    for name, size in sizes.items():
        how = f"{wanted.top_k} log-probabilities per token" if name == "top_k" else f"{wanted.hidden} x {wanted.dtype}"
        log.info("cache:   %-10s %10.3f GiB  %s", name, size / GIB, how)
    needed = total - tokens_done * (total // wanted.tokens)
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())).free
    log.info(
        "cache:   in all     %10.3f GiB, %d shards are there, %.3f GiB to write, %.1f GiB free",
        total / GIB, shards_done, needed / GIB, free / GIB,
    )  # fmt: skip
    if needed > free:
        raise InputError(
            f"cache.path: {folder} needs {needed / GIB:.3f} GiB and its disk has {free / GIB:.3f} GiB free; write cache.dtype: fp8 (half "
            "of bfloat16), cache.top_k: 64 in place of the final state, a strategy of fewer blocks (all_to_one needs one), fewer "
            "data.rows, or another cache.path"
        )
