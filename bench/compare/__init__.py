"""Base against head: two row files, or two revisions built and raced, judged case by case."""

from bench.compare.rows import Report, compare

__all__ = ["Report", "compare"]
