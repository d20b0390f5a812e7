"""Everybody else's MoE on a CPU, and the contest against them: loops, libraries, workers, `python -m bench peers`."""
