"""A TrainJob for Kubernetes with Kubeflow Trainer 2, and the runtime it refers to.

The runtime comes with the job because volumes and what a failed pod means can be said there in
every release of Trainer 2; in the job itself that part changed between releases. A pod that ends
with 75, or is evicted, is started again and goes on; any other exit code fails the job at once.
"""

from typing import Any

from unlearn.errors import UserError
from unlearn.jobs.documents import documents
from unlearn.jobs.job import GRACE_SECONDS, RESUMABLE, Job, seconds, start_lines

API = "trainer.kubeflow.org/v1alpha1"
NODE = "node"
"""Name that Kubeflow Trainer expects of the pods and of the container that trains."""


def train_job(
    job: Job, *, limited: bool = False, command: str = "unlearn launch --kubernetes"
) -> str:
    """Give the YAML of a TrainingRuntime and a TrainJob; ``limited`` sets ``job.time`` as deadline.

    Raises:
        UserError: no image, or a run folder that would be lost with its pod.
    """
    if not job.image:
        raise UserError(
            "a job on Kubernetes needs an image", "add --image IMAGE, with unlearn in it"
        )
    if not job.volume or job.volume.bucket:
        hint = "add --volume CLAIM:PATH, a claim that all pods may write (ReadWriteMany)"
        raise UserError("a job on Kubernetes needs a volume for its run folder", hint)
    job.volume.require_holds(job.out)
    comments = [f"Written by: {command}", "Start it with: kubectl apply -f FILE"]
    return documents(comments, [_runtime(job, limited), _job(job)])


def _job(job: Job) -> dict[str, Any]:
    trainer: dict[str, Any] = {"numNodes": job.nnodes, "numProcPerNode": job.nproc}
    if job.gpus:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": job.gpus}}
    reference = {"apiGroup": API.split("/")[0], "kind": "TrainingRuntime", "name": job.name}
    return {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": {"name": job.name},
        "spec": {
            "runtimeRef": reference,
            "trainer": trainer
            | {"image": job.image, "command": ["bash", "-c"], "args": [_script(job)]},
        },
    }


def _script(job: Job) -> str:
    """Give what every pod runs; ``exec``, so that the run itself gets the pod's SIGTERM."""
    setup = f"set -e\n{job.setup}\n" if job.setup else ""
    meeting = 'rdzv="$PET_MASTER_ADDR:$PET_MASTER_PORT"\n' if job.nnodes > 1 else ""
    return setup + meeting + start_lines(job, recipe_file="/tmp/recipe.yaml") + 'exec "$@"\n'


def _runtime(job: Job, limited: bool) -> dict[str, Any]:
    batch: dict[str, Any] = {"podFailurePolicy": {"rules": _rules()}}
    if limited:
        batch["activeDeadlineSeconds"] = seconds(job.time)
    replicated = {
        "name": NODE,
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": batch | {"template": {"spec": _pod(job)}},
        },
    }
    return {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": {"name": job.name},
        "spec": {
            "mlPolicy": {"numNodes": job.nnodes, "torch": {}},
            "template": {"spec": {"replicatedJobs": [replicated]}},
        },
    }


def _rules() -> list[dict[str, Any]]:
    """Say what a failed pod means; the first rule that fits counts, ``Ignore`` starts it again."""
    code = {"containerName": NODE, "values": [RESUMABLE]}
    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": code | {"operator": "In"}},
        {"action": "FailJob", "onExitCodes": code | {"operator": "NotIn"}},
    ]


def _pod(job: Job) -> dict[str, Any]:
    assert job.volume
    mounts = [
        {"name": "runs", "mountPath": job.volume.path},
        {"name": "shared-memory", "mountPath": "/dev/shm"},  # 64 MiB otherwise, too few for NCCL
    ]
    volumes = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": job.volume.source}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    return {
        "restartPolicy": "Never",  # the rules above decide
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [{"name": NODE, "image": job.image, "volumeMounts": mounts}],
        "volumes": volumes,
    }
