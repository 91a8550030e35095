"""How much memory there is, and work in portions that fit it."""

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from causalcone.engine.errors import ExperimentError, MemoryBudgetError

Item = TypeVar("Item")
Result = TypeVar("Result")
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

SHARE_OF_FREE = 0.5
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(memory: int | float | str) -> int:
    """Bytes from a number or a text such as ``"4GiB"``, ``"512 MB"``, ``"800M"``."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", str(memory), re.IGNORECASE)
    if not match or match[2].lower() not in _UNITS:
        raise ExperimentError(f"memory {memory!r} is not a number of bytes such as 2000000000 or '4GiB'")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ExperimentError(f"memory is {memory!r}; give a positive number of bytes")
    return size


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or the machine's within the limit of the process's control group."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *_control_group_free()])


def default_budget(device: torch.device) -> int:
    return int(SHARE_OF_FREE * free_bytes(device))


def _control_group_free(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What each control group above this process leaves; beyond that Linux kills instead of refusing."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in [group, *group.parents]:
            if folder != base and base not in folder.parents:
                break
            left = _left(folder, *names)
            if left is not None:
                free.append(left)
    return free


def _left(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max":
            return None
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, int(limit) - usage + int(stat.get(cache_name, 0)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; CPU allocators raise a plain RuntimeError, whose words differ by
    platform."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def fitting(items: Iterable[Item], weigh: Callable[[Item], int], limit: float) -> Iterator[list[Item]]:
    """Groups of consecutive items that weigh at most ``limit`` together, or of one item."""
    group: list[Item] = []
    total = 0
    for item in items:
        weight = weigh(item)
        if group and total + weight > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += weight
    if group:
        yield group


def halving(
    items: list[Item], function: Callable[[list[Item]], list[Result]], name: Callable[[Item], str]
) -> list[Result]:
    """``function`` of the items; where memory runs out, of one half after the other. Raises ``MemoryBudgetError`` with
    the name of an item that does not fit alone."""
    try:
        return function(items)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(items) == 1:
            raise MemoryBudgetError(
                f"memory ran out on {name(items[0])}; free some memory, or use a smaller dtype"
            ) from error
    if torch.cuda.is_available():  # the error and the tensors that it held are gone by now
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return [result for half in (items[:middle], items[middle:]) for result in halving(half, function, name)]


class RecentlyUsed(Generic[Key, Value]):
    """Values by key; the longest unused are dropped beyond a number of bytes, but for the last."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.entries: OrderedDict[Key, Value] = OrderedDict()

    def size(self, value: Value) -> int:
        raise NotImplementedError

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        if key in self.entries:
            self.entries.move_to_end(key)
        else:
            self.entries[key] = make()
            self.held += self.size(self.entries[key])
            while self.held > self.limit and len(self.entries) > 1:
                self.held -= self.size(self.entries.popitem(last=False)[1])
        return self.entries[key]
