"""Training on any number of processes: one recipe, any data, DDP, FSDP2 or expert parallelism."""
