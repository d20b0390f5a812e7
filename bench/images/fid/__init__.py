"""Frechet distances between sets of images, and a paired test of whether two samplers are at parity.

distance: moments, the distance, its influence function, statistics files. paired: the 1/N bias, the interval, the
verdict. extractors: images -> features. samples: npz files. command: `python -m bench fid`. coverage: the simulation
that the interval was chosen by.
"""

from bench.images.fid.distance import Moments, frechet_distance, load_moments, moments, save_moments
from bench.images.fid.paired import DIFFERENT, PARITY, UNSURE, Estimate, PairedDifference, compare, estimate

__all__ = [
    "DIFFERENT",
    "PARITY",
    "UNSURE",
    "Estimate",
    "Moments",
    "PairedDifference",
    "compare",
    "estimate",
    "frechet_distance",
    "load_moments",
    "moments",
    "save_moments",
]
