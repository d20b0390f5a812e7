"""Frechet distances between sets of images, and a paired test of whether two samplers are at parity.

distance: moments, the distance, its influence function, statistics files. paired: the 1/N bias, the interval, the
verdict. extractors: images -> features. samples: npz files. command: `python -m bench fid`. coverage: the simulation
that the interval was chosen by.
"""

from bench.images.fid.distance import Moments, frechet_distance, load_moments, moments, save_moments, transport
from bench.images.fid.paired import (
    DIFFERENT,
    PARITY,
    UNSURE,
    Estimate,
    PairedDifference,
    estimate,
    paired_difference,
    tost,
)

__all__ = [
    "DIFFERENT",
    "PARITY",
    "UNSURE",
    "Estimate",
    "Moments",
    "PairedDifference",
    "estimate",
    "frechet_distance",
    "load_moments",
    "moments",
    "paired_difference",
    "save_moments",
    "tost",
    "transport",
]
