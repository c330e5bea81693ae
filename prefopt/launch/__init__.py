"""A sweep becomes jobs, here or on Slurm."""
