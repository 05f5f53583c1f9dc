"""Quantiser profiles: how much of a tensor is kept, and by which rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DeadZoneRule:
    """Uniform steps of step_medians * median|r| with a dead zone; no k-means."""

    step_medians: float
    """Step, in medians of |r|. 2 to 4; larger is smaller and worse."""
    max_level: int = 15
    """Highest level coded; larger residuals are stored exactly (escapes)."""


@dataclass(frozen=True, kw_only=True)
class CentroidRule:
    """The published rule: prune below a threshold, k-means for the rest."""

    alpha: float = 5e-5
    """Threshold = alpha / sqrt(mean v) medians of |r| ..."""
    cap_medians: float = 2.5
    """... but at most this many medians."""
    num_centroids: int = 15
    """Codebook length without the zero: 4 bits."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One named quantiser. Frozen: a profile's name stands in checkpoints."""

    name: str
    weight: DeadZoneRule | CentroidRule
    beta: float
    """Moments are kept where |m| > beta * mean|m| and the weight's symbol is not 0. The published
    value is 2; bits are better spent on weights than on more moments, so balanced and small use 3
    (measured: benchmarks/results/excp_quantisers_cpu_202611.md)."""


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(name="excp", weight=CentroidRule(), beta=2.0),
        Profile(name="safe", weight=DeadZoneRule(step_medians=2.0), beta=2.0),
        Profile(name="balanced", weight=DeadZoneRule(step_medians=3.0), beta=3.0),
        Profile(name="small", weight=DeadZoneRule(step_medians=4.0), beta=3.0),
    )
}
