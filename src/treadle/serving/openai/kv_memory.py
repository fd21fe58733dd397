"""The memory of keys and values: how much there is, how much running sequences may need, and which others fit.

A sequence starts when its longest possible text fits beside those of all that run, so no running one is ever lost
for lack of memory. Buffers count as they are allocated, with their growth and padding.
"""

import logging
import resource
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from treadle.common.errors import OptionError
from treadle.engine.batch import Batch, Reading
from treadle.engine.engine import Engine
from treadle.engine.kv_cache import CacheSizes
from treadle.engine.sequence import TokenSequence

logger = logging.getLogger(__name__)

CPU_MEMORY_SHARE, GPU_MEMORY_SHARE = 0.5, 0.8
"""Keys and values may take this share of the free memory by default; passes and prefixes need the rest."""
MIN_KV_BYTES = 256 << 20
"""The bytes that keys and values get by default at least."""
DEFAULT_FREE_BYTES = 4 << 30
"""Free memory that is assumed if the system reports none."""
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device, cgroup: Path = CGROUP) -> int:
    """Return the free bytes of a device that this process may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [*_free_of_system(), *_free_of_cgroup(cgroup)]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    found += [limit - _taken()] if limit != resource.RLIM_INFINITY else []
    return max(0, min(found, default=DEFAULT_FREE_BYTES))


def _free_of_system() -> list[int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    return [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]


def _free_of_cgroup(folder: Path) -> list[int]:
    """Return the bytes that a container's limit leaves; nothing without a limit. Pages of files count as free."""
    try:
        limit, current = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:
        return []
    files = sum(int(size) for name, size in lines if name in ("active_file", "inactive_file"))
    return [int(limit) - int(current) + files] if limit.isdigit() else []


def _taken() -> int:
    """Return the bytes of this process's address space."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) << 12
    except OSError:  # not Linux
        return 0


class KvMemory:
    """Budgets the keys and values of running sequences, in bytes; only the engine's thread uses it."""

    def __init__(
        self,
        engine: Engine,
        mebibytes: int | None,
        prefix_mebibytes: int,
        free_memory: Callable[[torch.device], int] = free_memory,
    ) -> None:
        """Take at most this many MiB; None = a share of the memory that is free at the first sequence."""
        self._engine = engine
        self._free_memory = free_memory
        self._mebibytes = mebibytes
        self._prefix_bytes = prefix_mebibytes << 20

    @cached_property
    def total(self) -> int:
        """Bytes that all buffers may take together."""
        if self._mebibytes is not None:
            return self._mebibytes << 20
        device = self._engine.model.device
        share = CPU_MEMORY_SHARE if device.type == "cpu" else GPU_MEMORY_SHARE
        return max(MIN_KV_BYTES, int(share * (self._free_memory(device) - self._prefix_bytes)))

    @cached_property
    def sizes(self) -> CacheSizes:
        """Bytes that a sequence takes."""
        return self._probe.measure()

    @cached_property
    def usable(self) -> int:
        """Bytes to promise to sequences: while a layer's buffer grows, the old one exists, too."""
        token_bytes, state_bytes, num_layers = self.sizes
        usable = self.total * num_layers // (num_layers + 1) if num_layers else self.total
        given = f"{self.total / 2**20:.0f} MiB of keys and values"
        if token_bytes:
            logger.info("%s hold %d tokens (%.1f KiB each)", given, usable // token_bytes, token_bytes / 1024)
        if state_bytes:
            logger.info("%s hold the states of %d sequences", given, usable // state_bytes)
        return usable

    @cached_property
    def _probe(self) -> Batch:
        return self._engine.new_batch()

    def check(self, rows: Sequence[TokenSequence]) -> None:
        """Raise an OptionError for a row that never fits, even alone."""
        most = (self.usable - self.sizes.state_bytes) // max(self.sizes.token_bytes, 1)
        too_long = [row for row in rows if self._needed([row]) > self.usable]
        if too_long:
            row = max(too_long, key=lambda row: row.most_tokens)
            raise OptionError(
                f"the prompt has {row.prompt_tokens} tokens and the answer up to {row.sampling.max_tokens}; allowed: "
                f"at most {most} together, for which there is memory (--kv-memory). Ask for fewer max_tokens, or give "
                "a shorter prompt."
            )

    def has_room(self, batches: Sequence[Batch], batch: Batch, group: Sequence[TokenSequence]) -> bool:
        """Return whether rows fit into a batch beside the future needs of all batches."""
        others = sum(self._held(each, each.rows) for each in batches if each is not batch)
        wanted = self._held(batch, [*batch.rows, *group])
        # rows are read beside those that run; so are rows whose states ask for it, beside those they came with
        is_beside = bool(batch.rows) or (len(group) > 1 and any(row.trail for row in group))
        reading = self._bytes(len(group), max(len(row.ids) for row in group)) if is_beside else 0
        return others + wanted + reading <= self.usable

    def allow(self, batches: Sequence[Batch], reading: tuple[Batch, Reading] | None) -> None:
        """Tell each buffer how far it may grow, so that the others still have room for their needs."""
        held = {batch: self._held(batch, batch.rows) for batch in batches}
        inside = 0  # bytes of rows that join running ones: they exist twice then
        if reading is not None:
            batch, text = reading
            held[batch] = self._held(batch, [*batch.rows, *text.rows])
            if batch.rows:
                inside = max(text.cache.num_bytes, self._bytes(len(text.rows), text.length))
            own = inside or held[batch]
            text.cache.allow(self._layer_bytes(self.usable - sum(held.values()) - inside + own))
        for batch, own in held.items():
            batch.cache.allow(self._layer_bytes(self.usable - sum(held.values()) - inside + own))

    def _layer_bytes(self, num_bytes: int) -> int:
        return max(0, num_bytes) // max(self.sizes.num_layers, 1)

    def used(self, batches: Sequence[Batch], reading: tuple[Batch, Reading] | None) -> int:
        """Return the bytes of all buffers now."""
        return sum(batch.cache.num_bytes for batch in batches) + (reading[1].cache.num_bytes if reading else 0)

    def _held(self, batch: Batch, rows: Sequence[TokenSequence]) -> int:
        """Return the bytes of a batch with these rows, now or when all have grown, whichever is more."""
        return max(batch.cache.num_bytes, self._needed(rows))

    def _needed(self, rows: Sequence[TokenSequence]) -> int:
        """Return the bytes of fully grown rows, padded to the longest; rows that are read again count twice."""
        again = sum(map(self._probe.is_reread, rows))
        return self._bytes(len(rows) + again, max((row.most_tokens for row in rows), default=0))

    def _bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of rows that are padded to a length."""
        return num_rows * (length * self.sizes.token_bytes + self.sizes.state_bytes)
