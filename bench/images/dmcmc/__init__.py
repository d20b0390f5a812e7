"""Denoising MCMC, judged: chains against trajectories at equal evaluations and equal time.

levels: the noise-level classifier. arms: who competes, and with how many evaluations for what. tiers: an exact mixture,
and a trained model of the digits. judge: figures of a set of samples. loads: experts' load along both. verdicts: what
the rows say. command: `python -m bench dmcmc`.
"""
