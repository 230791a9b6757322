"""A task for SkyPilot.

As a managed job (``sky jobs launch``) it is started again when its machines are taken away, and
when the run ends with 75. Fields read in SkyPilot's YAML reference; ``recover_on_exit_codes`` is
newer than the rest, and older versions refuse the file.
"""

from typing import Any

from unlearn.errors import UserError
from unlearn.jobs.documents import documents
from unlearn.jobs.job import PORT, RESUMABLE, Job, Variable, start_lines

NODES = Variable("$SKYPILOT_NUM_NODES")


def task(job: Job, *, command: str = "unlearn launch --skypilot") -> str:
    """Give the YAML of a task. The folder it is launched from is copied to every node.

    Raises:
        UserError: GPUs without a kind, or a run folder that the nodes cannot share or would lose.
    """
    _check(job)
    content: dict[str, Any] = {"name": job.name, "num_nodes": job.nnodes, "workdir": "."}
    content["resources"] = _resources(job)
    if job.volume and job.volume.bucket:
        mount = {"source": job.volume.source, "mode": "MOUNT_CACHED"}
        content["file_mounts"] = {job.volume.path: mount}
    elif job.volume:
        content["volumes"] = {job.volume.path: job.volume.source}
    content["setup"] = f"{job.setup or 'pip install unlearn-llm'}\n"
    content["run"] = (
        f'rdzv="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"\n'
        + start_lines(job, recipe_file="/tmp/recipe.yaml", nnodes=NODES)
        + 'exec "$@"\n'
    )
    return documents([f"Written by: {command}", "Start it with: sky jobs launch FILE"], [content])


def _check(job: Job) -> None:
    if job.gpus and not job.accelerators:
        hint = "for instance --accelerators H100; --gpus-per-node 0 takes machines without any"
        raise UserError("SkyPilot must know which GPUs to take", hint)
    if job.accelerators and ":" in job.accelerators:
        hint = f"give the name alone: the number comes from --gpus-per-node, here {job.gpus}"
        raise UserError(f"--accelerators '{job.accelerators}' has a number", hint)
    if job.volume:
        job.volume.require_holds(job.out)
        if job.volume.bucket and job.nnodes > 1:
            hint = "give a volume of SkyPilot's, --volume NAME:PATH"
            raise UserError(f"{job.nnodes} nodes cannot share a run folder in a bucket", hint)


def _resources(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = {"cpus": f"{job.cpus}+"}
    if job.gpus:
        found["accelerators"] = f"{job.accelerators}:{job.gpus}"
    if job.image:
        image = job.image if ":" in job.image.split("/")[0] else f"docker:{job.image}"
        found["image_id"] = image
    return found | {"job_recovery": {"recover_on_exit_codes": [RESUMABLE]}}
