"""Any checkpoint to files of images or latents: image i depends on (seed, i), whoever draws it."""
