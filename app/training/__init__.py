"""Training: what a job runs. It reports by calling emit and does not know who listens."""
