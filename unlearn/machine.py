"""What this machine has: memory, processor cores, devices. Asks the system, never the network."""

import os
from pathlib import Path
from typing import Any

GIB = 2**30


def host_memory() -> tuple[int, int]:
    """Give the bytes of RAM that this process may use: in all, and available now.

    A container may be allowed less than the machine has; then its own limit counts.
    """
    total, available = _system_memory()
    limit, used = _container_memory()
    if limit is None or limit >= total:
        return total, available
    return limit, min(available, limit - used)


def _system_memory() -> tuple[int, int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {name: int(rest.split()[0]) * 1024 for name, _, rest in _split(lines)}
        return found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, total


def _split(lines: list[str]) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in lines]


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Give the limit of a Linux control group (version 2, then 1) and what is in use of it."""
    places = (
        (root / "memory.max", root / "memory.current", root / "memory.stat"),
        (
            root / "memory/memory.limit_in_bytes",
            root / "memory/memory.usage_in_bytes",
            root / "memory/memory.stat",
        ),
    )
    for limit, used, stat in places:
        try:
            return int(limit.read_text()), int(used.read_text()) - _reclaimable(stat)
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None, 0


def _reclaimable(stat: Path) -> int:
    """Give the bytes of cached files, which make room when memory is asked for."""
    for line in stat.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def cores() -> int:
    """Give the processor cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def devices() -> list[dict[str, Any]]:
    """Describe every CUDA device: name, memory in all and free now, bfloat16; empty without."""
    import torch  # noqa: PLC0415 - takes a second, and most of this module does not need it

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        capability = f"{properties.major}.{properties.minor}"
        found.append(
            {
                "name": properties.name,
                "total_bytes": total,
                "free_bytes": free,
                "capability": capability,
                "bfloat16": properties.major >= 8,
            }
        )
    return found


def free_device_memory() -> int | None:
    """Give the bytes that this process may still take on its CUDA device; None without CUDA."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return None
    free = int(torch.cuda.mem_get_info()[0])
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
