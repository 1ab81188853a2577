"""Jobs: the folder that is the whole conversation, the worker, the keeper and the runner."""

# OpenMP's threads spin while they wait for each other, and on a machine where somebody else runs
# too, a small model's step then takes ten times as long. Read when torch is imported.
SLEEPING_THREADS = ("OMP_WAIT_POLICY", "PASSIVE")
