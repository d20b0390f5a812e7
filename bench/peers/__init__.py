"""Everybody else's MoE on a CPU, and the contest against them: `python -m bench peers`."""
