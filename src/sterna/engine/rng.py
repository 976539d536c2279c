"""Counter-based random numbers: the value depends on its name, not on what was drawn before.

A sampled token's uniform is named by (seed, sample index, token position). So the same seed gives
the same tokens whatever else is in the batch, after a preemption, and in any order of sampling;
there is no generator state to save. The mixer is the finaliser of SplitMix64 (Steele, Lea, Flood
2014, "Fast splittable pseudorandom number generators"), one round a word.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def mix(state: int, word: int) -> int:
    """Hash `word` (any int) into the 64-bit `state`."""
    z = (state + (word & _MASK) * _GAMMA + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, sample_idx: int, position: int) -> float:
    """A float in [0, 1) with 53 random bits."""
    return (mix(mix(mix(0, seed), sample_idx), position) >> 11) * 2.0**-53
