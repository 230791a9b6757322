"""`unlearn doctor`: it says what is there, fails for problems alone, and never breaks."""

import socket
import time
from importlib import metadata
from typing import Any, get_args

import pytest

from unlearn import doctor, surroundings
from unlearn.engines import Engine

GROUPS = {"packages", "devices", "storage", "launching", "offline", "engines"}


@pytest.fixture
def quick(monkeypatch: Any) -> None:
    """Take DeepSpeed's import for granted: it takes seconds."""
    monkeypatch.setattr(doctor._DeepSpeedTrial, "__init__", lambda self: None)
    monkeypatch.setattr(doctor._DeepSpeedTrial, "failure", lambda self: "")


@pytest.fixture
def without(monkeypatch: Any) -> Any:
    """Give a function that makes a package look as if it were not installed."""
    real = metadata.version

    def hide(package: str) -> None:
        def version(name: str) -> str:
            if name == package:
                raise metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(metadata, "version", version)

    return hide


def found(findings: list[Any], name: str) -> Any:
    return next(one for one in findings if one.name == name)


def test_the_real_machine_in_seconds(unlearn: Any) -> None:
    start = time.monotonic()
    outcome = unlearn("doctor", "--json")
    assert time.monotonic() - start < 30  # 3.5 s alone; tests share the machine
    findings = outcome.json["findings"]
    assert outcome.code == (0 if outcome.json["ok"] else 1)
    assert {one["group"] for one in findings} == GROUPS
    assert all(one["advice"] for one in findings if one["status"] != "ok")
    torch = next(one for one in findings if one["name"] == "torch")
    assert metadata.version("torch") in torch["found"]
    assert ">=" in torch["found"]


def test_every_engine_is_looked_at(quick: None) -> None:
    assert set(doctor.ENGINES) == set(get_args(Engine))
    names = [one.name for one in doctor.examine() if one.group == "engines"]
    assert set(doctor.ENGINES) <= set(names)


def test_a_missing_deepspeed_is_a_problem_only_for_its_engines(unlearn: Any, without: Any) -> None:
    without("deepspeed")
    assert unlearn("doctor").code == 0
    asked = unlearn("doctor", "--engine", "zero3", "--json")
    assert asked.code == 1
    problems = [one for one in asked.json["findings"] if one["status"] == "problem"]
    assert [one["name"] for one in problems] == ["zero3"]
    assert "pip install deepspeed" in problems[0]["advice"]
    assert unlearn("doctor", "--engine", "fsdp2").code == 0


def test_a_missing_package_is_a_problem(unlearn: Any, quick: None, without: Any) -> None:
    without("peft")
    outcome = unlearn("doctor")
    assert outcome.code == 1
    assert "pip install peft" in outcome.out
    assert "1 problem" in outcome.out


def test_a_package_out_of_range_is_a_problem(quick: None, monkeypatch: Any) -> None:
    real = metadata.version
    old = {"transformers": "4.50.0"}
    monkeypatch.setattr(metadata, "version", lambda name: old.get(name) or real(name))
    one = found(doctor.examine(), "transformers")
    assert (one.status, one.advice[:25]) == ("problem", "pip install 'transformers")


def test_a_check_that_fails_itself_is_a_finding(quick: None, monkeypatch: Any) -> None:
    def broken() -> list[dict[str, Any]]:
        raise RuntimeError("driver too old\nand more")

    monkeypatch.setattr("unlearn.machine.devices", broken)
    findings = doctor.examine()
    one = found(findings, "devices")
    assert (one.status, one.found) == (
        "warning", "could not be examined: RuntimeError: driver too old",
    )  # fmt: skip
    assert {one.group for one in findings} == GROUPS


def test_an_import_of_deepspeed_that_fails_says_why(monkeypatch: Any) -> None:
    real = doctor.subprocess.Popen

    def broken(command: list[str], **named: Any) -> Any:
        return real([command[0], "-c", "raise OSError('no CUDA_HOME')"], **named)

    monkeypatch.setattr(doctor.subprocess, "Popen", broken)
    one = found(doctor.examine(engine="zero2"), "zero2")
    assert one.status == "problem"
    assert one.advice == "`import deepspeed` fails: OSError: no CUDA_HOME"


def test_a_cpu_without_compiler_cannot_use_zero(quick: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(doctor, "_has_cuda", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    findings = doctor.examine()
    assert "install g++ and ninja" in found(findings, "zero2").advice
    assert found(findings, "ddp").status == "ok"


def test_nothing_but_this_machine_is_asked(quick: None, monkeypatch: Any) -> None:
    asked: list[Any] = []
    real = socket.socket.connect

    def connect(self: Any, address: Any) -> Any:
        asked.append(address)
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    doctor.examine()
    assert {address[0] for address in asked} <= {"127.0.0.1"}


def test_network_is_asked_when_wanted(quick: None, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    one = found(doctor.examine(network=True), "network")
    assert one.status == "warning"
    assert "127.0.0.1:9" in one.found


def test_caches_full_disks_and_few_files_are_warned_of(monkeypatch: Any, tmp_path: Any) -> None:
    usage = type("Usage", (), {"free": 2**20, "total": 2**30})
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda place: usage)
    monkeypatch.setattr(surroundings.resource, "getrlimit", lambda kind: (256, 1024))
    monkeypatch.setattr(surroundings.os, "access", lambda place, mode: False)
    storage = list(surroundings.storage())
    assert all(one.status == "warning" and one.advice for one in storage)
    files = found(list(surroundings.launching()), "open files")
    assert (files.status, files.advice) == ("warning", "ulimit -n 4096 (the most here is 1024)")


def test_a_name_that_is_not_found(monkeypatch: Any) -> None:
    def lost(name: str) -> str:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", lost)
    one = found(list(surroundings.launching()), "own name")
    assert one.status == "warning"
    assert "/etc/hosts" in one.advice


def test_what_is_downloaded_matters_offline(monkeypatch: Any, tmp_path: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "models--someone--a-model" / "snapshots").mkdir(parents=True)
    findings = list(surroundings.offline())
    assert found(findings, "models").found == "1 downloaded: someone/a-model"
    assert found(findings, "datasets").status == "warning"


def test_memory_of_a_container_counts(tmp_path: Any, monkeypatch: Any) -> None:
    from unlearn import machine

    (tmp_path / "memory.max").write_text("8000\n")
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    assert machine._container_memory(tmp_path) == (8000, 3000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._container_memory(tmp_path) == (None, 0)
    monkeypatch.setattr(machine, "_container_memory", lambda: (8000, 3000))
    assert machine.host_memory() == (8000, 5000)
