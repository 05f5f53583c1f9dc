"""``import effx_dist.deepspeed``: the adapter of DeepSpeed, effx_dist.engines.deepspeed, by its public name."""

from __future__ import annotations

import sys

from effx_dist import _import_engine

# The adapter itself and not a copy of its names, which would be another module with a state of its own.
sys.modules[__name__] = _import_engine("deepspeed")  # type: ignore[assignment]
