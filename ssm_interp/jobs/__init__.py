"""Jobs: computations in shards that are stored as they finish, go on where they were, and run here or on a cluster."""

from ssm_interp.errors import JobError, JobWarning
from ssm_interp.jobs.job import Job, Prepared, Report, Shard, Where, Worker
from ssm_interp.jobs.run import Progress, run
from ssm_interp.jobs.store import Store, job_folder

__all__ = [
    "Job",
    "JobError",
    "JobWarning",
    "Prepared",
    "Progress",
    "Report",
    "Shard",
    "Store",
    "Where",
    "Worker",
    "job_folder",
    "run",
]
