"""Whether this machine is ready: packages, devices, engines, caches, disks, launching, offline.

Every check gives findings, each ``ok``, a ``warning`` or a ``problem`` with what to do about it. A
check that fails itself is a finding too. Nothing here asks the network, unless it is told to.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from unlearn import machine, surroundings
from unlearn.surroundings import Finding, Status

GIB = 2**30
PACKAGE = "unlearn-llm"
SHOWN = (
    "torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets", "lm-eval",
    "typer", "pydantic", "safetensors", "bitsandbytes", "submitit",
)  # fmt: skip
OPTIONAL = {
    "deepspeed": "for engines zero2, zero3 and zero3-offload",
    "bitsandbytes": "for model.quantize",
    "submitit": "to submit SLURM jobs from here",
}
"""Packages that some runs do without, and what they are for."""
ENGINES = ("none", "ddp", "fsdp2", "zero2", "zero3", "zero3-offload")
IMPORT_SECONDS = 60
"""Longest wait for DeepSpeed's import, which takes two to six seconds on an idle machine."""


def examine(*, engine: str | None = None, network: bool = False) -> list[Finding]:
    """Look at everything; with an ``engine``, it is a problem when that one does not work."""
    trial = _DeepSpeedTrial()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", _packages),
        ("devices", _devices),
        ("storage", surroundings.storage),
        ("launching", surroundings.launching),
        ("offline", partial(surroundings.offline, network=network)),
        ("engines", partial(_engines, engine, trial)),
    ]
    found = []
    for group, check in checks:
        try:
            found += list(check())
        except Exception as error:  # what is being looked for may be broken in any way
            cause = f"could not be examined: {type(error).__name__}: {error}"
            found.append(Finding(group, group, "warning", cause.splitlines()[0]))
    return found


def healthy(findings: list[Finding]) -> bool:
    """Tell whether nothing is a problem."""
    return all(finding.status != "problem" for finding in findings)


def to_dicts(findings: list[Finding]) -> list[dict[str, str]]:
    """Give findings as plain values."""
    return [asdict(finding) for finding in findings]


# Packages


def _packages() -> Iterator[Finding]:
    python = sys.version.split()[0]
    old = sys.version_info < (3, 11)
    advice = "Python 3.11 or newer is needed" if old else ""
    yield Finding("packages", "python", "problem" if old else "ok", python, advice)
    own = _version(PACKAGE)
    missing = "" if own else "make quickstart, or pip install -e ."
    yield Finding("packages", "unlearn", "ok" if own else "warning", own or "as a folder", missing)
    ranges, tested = _ranges(), _tested()
    for name in SHOWN:
        yield _package(name, ranges.get(name), tested.get(name))


def _package(name: str, wanted: Any, tested: str | None) -> Finding:
    version = _version(name)
    if version is None:
        purpose = OPTIONAL.get(name)
        if purpose:
            return Finding("packages", name, "ok", f"not installed; only needed {purpose}")
        return Finding("packages", name, "problem", "not installed", f"pip install {name}")
    found = version + (f", built for CUDA {_cuda()}" if name == "torch" and _cuda() else "")
    notes = [f"needs {wanted}"] if wanted and str(wanted) else []
    notes += [f"tested {tested}"] if tested else []
    shown = found + (f" ({', '.join(notes)})" if notes else "")
    if wanted and not wanted.contains(version, prereleases=True):
        return Finding("packages", name, "problem", shown, f"pip install '{name}{wanted}'")
    return Finding("packages", name, "ok", shown)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    import torch  # noqa: PLC0415 - may be missing, which is what is examined

    return torch.version.cuda


def _ranges() -> dict[str, Any]:
    """Give the versions that this package asks for, by name."""
    from packaging.requirements import Requirement  # noqa: PLC0415

    try:
        wanted = [Requirement(line) for line in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement.specifier for requirement in wanted}


def _tested() -> dict[str, str]:
    """Give the versions this project was tested with, where its checkout is at hand."""
    path = Path(__file__).parents[1] / "constraints.txt"
    if not path.is_file():
        return {}
    pairs = (line.split("==") for line in path.read_text().splitlines() if "==" in line)
    return {name.strip().replace("_", "-"): version.strip() for name, version in pairs}


# Devices


def _devices() -> Iterator[Finding]:
    from torch import distributed  # noqa: PLC0415

    devices = machine.devices()
    for number, device in enumerate(devices):
        yield _device(number, device)
    if not devices:
        yield Finding("devices", "device", "ok", "no CUDA device: runs use the CPU, in float32")
    total, available = machine.host_memory()
    memory = f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
    low = available < 2 * GIB
    advice = "a process alone takes 0.6 GiB: end others" if low else ""
    yield Finding("devices", "memory", "warning" if low else "ok", memory, advice)
    yield Finding("devices", "cores", "ok", str(machine.cores()))
    backend = "nccl" if devices else "gloo"
    there = distributed.is_available() and distributed.is_backend_available(backend)
    advice = "" if there else "take a build of torch with it: several processes talk through it"
    found = f"{backend} {'available' if there else 'missing'}"
    yield Finding("devices", "backend", "ok" if there else "warning", found, advice)


def _device(number: int, device: dict[str, Any]) -> Finding:
    free, total = device["free_bytes"] / GIB, device["total_bytes"] / GIB
    found = f"{device['name']}, {total:.0f} GiB, {free:.0f} GiB free"
    if not device["bfloat16"]:
        advice = "set model.dtype=float32: bfloat16 needs compute capability 8.0"
        return Finding("devices", f"cuda:{number}", "warning", f"{found}, no bfloat16", advice)
    if free < 0.8 * total:
        return Finding("devices", f"cuda:{number}", "warning", found, "in use: see `nvidia-smi`")
    return Finding("devices", f"cuda:{number}", "ok", f"{found}, bfloat16")


# Engines


class _DeepSpeedTrial:
    """An import of DeepSpeed in a process of its own: it takes seconds, and may end badly."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        if _version("deepspeed") is None or _version("torch") is None:
            return
        choice = {} if _has_cuda() else {"DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-c", "import deepspeed"]
        self.process = subprocess.Popen(
            command, env=os.environ | choice, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def failure(self) -> str:
        """Give the last line of what went wrong, or nothing."""
        if self.process is None:
            return "deepspeed is not installed: pip install deepspeed"
        try:
            _, said = self.process.communicate(timeout=IMPORT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return f"`import deepspeed` took more than {IMPORT_SECONDS} s"
        if self.process.returncode == 0:
            return ""
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        return f"`import deepspeed` fails: {lines[-1] if lines else 'without a word'}"


def _has_cuda() -> bool:
    try:
        return bool(machine.devices())
    except Exception:  # a broken driver is reported with the devices
        return False


def _engines(wanted: str | None, trial: _DeepSpeedTrial) -> Iterator[Finding]:
    on_cpu, failure = not _has_cuda(), trial.failure()
    yield from _compilers(on_cpu)
    for engine in ENGINES:
        why = _obstacle(engine, failure, on_cpu=on_cpu)
        status: Status = "problem" if why and engine == wanted else "warning" if why else "ok"
        slow = ", once DeepSpeed has compiled for a few minutes in the first run"
        works = f"works{slow if on_cpu and engine.startswith('zero') else ''}"
        yield Finding("engines", engine, status, "does not work" if why else works, why)


def _obstacle(engine: str, deepspeed: str, *, on_cpu: bool) -> str:
    """Say why an engine would not work here; nothing when it would."""
    from torch import distributed  # noqa: PLC0415

    if engine == "none":
        return ""
    if not distributed.is_available():
        return "this torch was built without torch.distributed"
    if engine in ("ddp", "fsdp2"):
        return ""
    if deepspeed:
        return deepspeed
    needed = [name for name in ("g++", "ninja") if not shutil.which(name)] if on_cpu else []
    if needed:
        names = " and ".join(needed)
        return f"on a CPU DeepSpeed compiles how processes talk: install {names}"
    return ""


def _compilers(on_cpu: bool) -> Iterator[Finding]:
    for name in ("g++", "ninja"):
        place = shutil.which(name)
        use = "DeepSpeed on a CPU compiles with it" if on_cpu else "not needed on CUDA"
        advice = "" if place or not on_cpu else f"install {name}, for zero2 and zero3 on a CPU"
        status: Status = "warning" if advice else "ok"
        yield Finding("engines", name, status, place or f"not found; {use}", advice)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    place = shutil.which("nvcc")
    found = f"{place or 'not found'}{f', CUDA_HOME={home}' if home else ''}"
    yield Finding("engines", "nvcc", "ok", f"{found}; no engine here compiles for CUDA")
