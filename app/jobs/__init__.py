"""Jobs: the folder that is the whole conversation, the worker, the keeper and the runner."""
