"""What every test shares: one compute thread, and property tests that are not timed."""

from __future__ import annotations

import os

# Before torch is imported, and for every process that a test starts: ranks that each take all the
# cores would crowd each other out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("effx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("effx")
