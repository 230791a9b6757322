"""What a run needs around it: caches, disks, a way for processes to meet, what is there offline."""

import os
import resource
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn.runs import cache_folder

Status = Literal["ok", "warning", "problem"]
GIB = 2**30
COUNTED_SECONDS = 1.5
"""Time for counting what a cache holds; a larger one is given as a lower bound."""
PATIENCE = 3.0
"""Seconds that a name or an address may take to be found."""
FILES_AT_ONCE = 4096
"""Open files that a large run may need: shards, workers, sockets."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, what was found, and what to do if it is not as it should be."""

    group: str
    name: str
    status: Status
    found: str
    advice: str = ""


# Caches and disks


def storage() -> Iterator[Finding]:
    """Look at the caches and at the disks under everything a run writes."""
    hub = _hub_home()
    yield _cache("hub cache", hub, "HF_HOME")
    yield _cache("own cache", cache_folder(), "UNLEARN_CACHE")
    places = {
        "this folder": (Path.cwd(), 10.0),
        "the hub cache": (hub, 10.0),
        "the own cache": (cache_folder(), 1.0),
        "temporary files": (Path(os.environ.get("TMPDIR") or "/tmp"), 1.0),
    }
    for name, (place, least) in places.items():
        yield _disk(f"disk of {name}", place, least, f"free some: {least:g} GiB are soon full")
    shared = Path("/dev/shm")
    if shared.exists():
        yield _disk(str(shared), shared, 0.5, "processes share data there: docker --shm-size=1g")


def _hub_home() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or root / "huggingface")


def _cache(name: str, place: Path, variable: str) -> Finding:
    if not os.access(_existing(place), os.W_OK):
        advice = f"let {variable} name a folder that you may write"
        return Finding("storage", name, "warning", f"{place} cannot be written", advice)
    if not place.exists():
        return Finding("storage", name, "ok", f"{place}, empty so far")
    size, complete = _size(place)
    return Finding("storage", name, "ok", f"{place}, {'' if complete else 'over '}{amount(size)}")


def _disk(name: str, place: Path, least: float, advice: str) -> Finding:
    usage = shutil.disk_usage(_existing(place))
    found = f"{amount(usage.free)} free of {amount(usage.total)}"
    if usage.free < least * GIB:
        return Finding("storage", name, "warning", found, advice)
    return Finding("storage", name, "ok", found)


def _existing(place: Path) -> Path:
    return next(one for one in (place.absolute(), *place.absolute().parents) if one.exists())


def amount(size: float) -> str:
    """Write a number of bytes in the unit in which it is read at a glance."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def _size(place: Path) -> tuple[int, bool]:
    """Add up the files of a folder, as far as it goes in :data:`COUNTED_SECONDS`."""
    total, start = 0, time.monotonic()
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder) / name
            total += 0 if path.is_symlink() else path.stat().st_size
        if time.monotonic() - start > COUNTED_SECONDS:
            return total, False
    return total, True


# Launching


def launching() -> Iterator[Finding]:
    """Look at what several processes need to find each other and to work."""
    yield _free_port()
    yield _own_name()
    yield _open_files()


def _free_port() -> Finding:
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            with socket.create_connection(server.getsockname(), timeout=PATIENCE):
                pass
    except OSError as error:
        advice = "processes of one node meet there: allow connections to 127.0.0.1"
        return Finding("launching", "localhost", "problem", f"no port: {error}", advice)
    return Finding("launching", "localhost", "ok", "a free port can be opened and reached")


def _own_name() -> Finding:
    """Look the own name up; torch.distributed does, and waits long when it is not found."""
    name = socket.gethostname()
    pool = ThreadPoolExecutor(1)
    try:
        found = pool.submit(socket.gethostbyname, name).result(timeout=PATIENCE)
    except (OSError, TimeoutError):
        advice = f"add `127.0.1.1 {name}` to /etc/hosts, or starting several processes may hang"
        return Finding("launching", "own name", "warning", f"{name} is not found", advice)
    finally:
        pool.shutdown(wait=False)
    return Finding("launching", "own name", "ok", f"{name} is {found}")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < FILES_AT_ONCE:
        most = "" if hard >= FILES_AT_ONCE or hard < 0 else f" (the most here is {hard})"
        advice = f"ulimit -n {FILES_AT_ONCE}{most}"
        return Finding("launching", "open files", "warning", f"at most {soft}", advice)
    found = "as many as you like" if soft < 0 else f"at most {soft}"
    return Finding("launching", "open files", "ok", found)


# Offline


def offline(*, network: bool = False) -> Iterator[Finding]:
    """Look at what there is without a network; with ``network``, ask whether the hub answers."""
    off = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if _set(name)]
    found = f"{' and '.join(off)} set: nothing is downloaded" if off else "downloads are allowed"
    yield Finding("offline", "hub", "ok", f"{found}; --offline switches them off for a command")
    yield _downloaded("models", bool(off))
    yield _downloaded("datasets", bool(off))
    if network:
        yield _reachable()


def _set(name: str) -> bool:
    return os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")


def _downloaded(kind: str, off: bool) -> Finding:
    folder = Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")
    complete = sorted(path.parent for path in folder.glob(f"{kind}--*/snapshots"))
    names = [path.name.removeprefix(f"{kind}--").replace("--", "/") for path in complete]
    if not names:
        advice = f"give {kind} as folders, or download them while there is a network" if off else ""
        return Finding("offline", kind, "warning" if off else "ok", "none downloaded", advice)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Finding("offline", kind, "ok", f"{len(names)} downloaded: {shown}")


def _reachable() -> Finding:
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with urllib.request.urlopen(address, timeout=PATIENCE):
            return Finding("offline", "network", "ok", f"{address} answers")
    except urllib.error.HTTPError as error:
        return Finding("offline", "network", "ok", f"{address} answers ({error.code})")
    except OSError as error:
        cause = str(getattr(error, "reason", error))
        advice = "check the network or a proxy, or use --offline with what is there"
        return Finding("offline", "network", "warning", f"{address}: {cause}", advice)
