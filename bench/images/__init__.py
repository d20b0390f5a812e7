"""Does the model paint the same pictures? Data, training, checkpoints, where experts go, parity, Frechet distances."""
