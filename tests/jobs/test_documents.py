"""Jobs for SkyPilot and Kubernetes: valid YAML, right counts, scripts that start and resume."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from unlearn.errors import UserError
from unlearn.jobs import Job, Volume, task, train_job
from unlearn.jobs.job import RECIPE, seconds

RUNS = Volume("claim", "/runs")
JOB = Job(
    ("npo", "--out", "/runs/a"), "/runs/a", nnodes=2, nproc=8, volume=RUNS,
    accelerators="H100", image="registry/unlearn:1",
)  # fmt: skip


def pods(job: Job, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    runtime, train = yaml.safe_load_all(train_job(job, **options))
    assert (runtime["kind"], train["kind"]) == ("TrainingRuntime", "TrainJob")
    assert {one["apiVersion"] for one in (runtime, train)} == {"trainer.kubeflow.org/v1alpha1"}
    assert train["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"], train["spec"]["trainer"]


def test_a_train_job_has_nodes_processes_and_gpus() -> None:
    batch, trainer = pods(JOB)
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": 8}}
    assert trainer["image"] == "registry/unlearn:1"
    assert "activeDeadlineSeconds" not in batch
    assert "resourcesPerNode" not in pods(replace(JOB, gpus_per_node=0))[1]
    assert pods(replace(JOB, time="1-0"), limited=True)[0]["activeDeadlineSeconds"] == 86400


def test_the_run_folder_lies_on_the_claim_and_a_pod_has_time_to_save() -> None:
    pod = pods(JOB)[0]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["volumeMounts"][0] == {"name": "runs", "mountPath": "/runs"}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert pod["terminationGracePeriodSeconds"] == 120


@pytest.mark.parametrize(
    ("code", "action"), [(75, "Ignore"), (1, "FailJob"), (2, "FailJob"), (137, "FailJob")]
)
def test_a_pod_that_was_interrupted_is_started_again_and_no_other(code: int, action: str) -> None:
    """As Kubernetes reads the rules: the first that fits; Ignore starts it again, uncounted."""
    batch, _ = pods(JOB)
    assert batch["template"]["spec"]["restartPolicy"] == "Never"  # else the rules are refused
    for rule in batch["podFailurePolicy"]["rules"]:
        asked = rule.get("onExitCodes")
        if asked and (code in asked["values"]) == (asked["operator"] == "In"):
            assert rule["action"] == action
            return
    pytest.fail("no rule fits")


def test_a_task_has_nodes_and_gpus() -> None:
    found = yaml.safe_load(task(JOB))
    assert found["num_nodes"] == 2
    assert found["resources"]["accelerators"] == "H100:8"
    assert found["resources"]["cpus"] == "32+"
    assert found["resources"]["image_id"] == "docker:registry/unlearn:1"
    assert found["resources"]["job_recovery"] == {"recover_on_exit_codes": [75]}
    assert found["volumes"] == {"/runs": "claim"}
    alone = replace(JOB, nnodes=1, volume=Volume("s3://bucket/x", "/runs"))
    mounts = yaml.safe_load(task(alone))["file_mounts"]
    assert mounts == {"/runs": {"source": "s3://bucket/x", "mode": "MOUNT_CACHED"}}


def script(kind: str, job: Job) -> str:
    if kind == "skypilot":
        return str(yaml.safe_load(task(job))["run"])
    _, trainer = pods(job)
    assert trainer["command"] == ["bash", "-c"]
    return str(trainer["args"][0])


VARIABLES = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2",
    "PET_MASTER_ADDR": "10.0.0.1", "PET_MASTER_PORT": "29500",
}  # fmt: skip


def said(text: str, folder: Path) -> list[str]:
    """Run a script in bash with a stand-in for ``unlearn``; give the words that it was given."""
    (folder / "unlearn").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (folder / "unlearn").chmod(0o755)
    variables = os.environ | VARIABLES | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", text], env=variables, capture_output=True, text=True, check=True, cwd=folder
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["skypilot", "kubernetes"])
def test_the_script_starts_the_run_and_later_resumes_it(kind: str, tmp_path: Path) -> None:
    out, meeting = f"{tmp_path}/it's", ["--rdzv", "10.0.0.1:29500"]
    volume = Volume("claim", str(tmp_path))
    job = replace(JOB, arguments=("npo", "--out", out), out=out, volume=volume)
    run = ["run", "npo", "--out", out, "--nnodes", "2", "--nproc", "8", *meeting]
    assert said(script(kind, job), tmp_path) == run
    Path(out).mkdir()
    (Path(out) / "recipe.yaml").touch()
    assert said(script(kind, job), tmp_path) == ["resume", out, *meeting]
    assert said(script(kind, replace(job, nnodes=1)), tmp_path) == ["resume", out]


@pytest.mark.parametrize("kind", ["skypilot", "kubernetes"])
def test_a_recipe_of_the_user_travels_with_the_job(kind: str, tmp_path: Path) -> None:
    text = 'method: npo\ndescription: "it\'s $HOME: \\t # ü"\n'
    job = replace(JOB, arguments=(RECIPE,), recipe=text)
    assert said(script(kind, job), tmp_path)[1] == "/tmp/recipe.yaml"
    assert Path("/tmp/recipe.yaml").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("90", 5400), ("30:10", 1810), ("1:00:00", 3600), ("1-0", 86400), ("1-2:30", 95400),
        ("2-03:04:05", 183845),
    ],
)  # fmt: skip
def test_a_time_limit_is_read_as_slurm_reads_it(time: str, expected: int) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "1h", "1:2:3:4", "3", "-1", "03:59"])
def test_a_wrong_time_limit_is_refused(time: str) -> None:
    with pytest.raises(UserError, match="--time"):
        seconds(time)


@pytest.mark.parametrize("text", ["claim", "claim:runs", ":/runs", "s3://bucket", "s3://b:runs"])
def test_a_wrong_volume_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not SOURCE:PATH"):
        Volume.parse(text)


@pytest.mark.parametrize(
    ("write", "changes", "words"),
    [
        (train_job, {"image": None}, "needs an image"),
        (train_job, {"volume": None}, "needs a volume"),
        (train_job, {"volume": Volume("s3://b", "/runs")}, "needs a volume"),
        (train_job, {"out": "/elsewhere/a"}, "does not lie in the volume"),
        (task, {"accelerators": None}, "which GPUs"),
        (task, {"accelerators": "H100:4"}, "has a number"),
        (task, {"out": "runs/a"}, "does not lie in the volume"),
        (task, {"volume": Volume("s3://b", "/runs")}, "cannot share a run folder in a bucket"),
    ],
)
def test_what_would_fail_on_the_cluster_is_refused_here(
    write: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write(replace(JOB, **changes))


@pytest.mark.parametrize("out", ["runs/A_b.c", "/x/1.", "é", "x" * 80, "--"])
def test_names_are_those_every_scheduler_takes(out: str) -> None:
    import re

    name = replace(JOB, out=out).name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 40
