"""Runs handed to a scheduler: what to type on each node, and job files that start and resume a run.

A job is text: nothing here talks to a scheduler except :func:`submit`. A job file is complete in
itself. It holds the command as one would type it, which can be read and changed by hand; a recipe
that is a file of the user's is written into the job as it stands, so that editing the file while
the job waits in a queue changes nothing.
"""

from unlearn.jobs.commands import node_commands
from unlearn.jobs.job import Job, Volume
from unlearn.jobs.kubernetes import train_job
from unlearn.jobs.skypilot import task
from unlearn.jobs.slurm import batch_script
from unlearn.jobs.submission import submit

__all__ = ["Job", "Volume", "batch_script", "node_commands", "submit", "task", "train_job"]
