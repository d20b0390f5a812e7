"""The half hour with a GPU, prepared: one command, rehearsed on a CPU."""
