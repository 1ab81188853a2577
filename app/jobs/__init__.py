"""Jobs: the folder that is the whole conversation, the worker, the keeper and the runner."""

# OpenMP's threads spin while they wait for each other. Where somebody else runs on the machine too,
# a small model's step then takes ten times as long; where they sleep at once, three times as long
# on an idle machine. So they spin briefly. Read when torch is imported.
BRIEF_SPIN = ("GOMP_SPINCOUNT", "1000")
