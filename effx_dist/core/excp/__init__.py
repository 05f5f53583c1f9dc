"""ExCP: residual, joint pruning and quantisation of a parameter tensor and its moments.

Read profiles.py, statistics.py (rounds 1 and 2), dead_zone.py, moments.py and joint.py (round 3 and
the quantiser), in this order. Arithmetic on numpy arrays; no ranks, no files. What takes the time
is there twice: as numpy says it, and compiled (effx_dist/native), with the same bits.
"""

from effx_dist.core.excp.arrays import JointArrays, JointSymbols
from effx_dist.core.excp.joint import JointQuantiser, build_quantiser, cells, cells_len
from effx_dist.core.excp.lossless import (
    delta_bits,
    folded_delta,
    undo_delta_bits,
    undo_folded_delta_,
)
from effx_dist.core.excp.profiles import PROFILES, CentroidRule, DeadZoneRule, Profile
from effx_dist.core.excp.statistics import RANGES_LEN, SUMS_LEN, ranges, sums
