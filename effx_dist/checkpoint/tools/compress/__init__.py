"""An existing series of plain checkpoints as a compressed chain.

Read run.py first, then content.py (what a plain checkpoint holds) and the file of a source format.
"""

from __future__ import annotations

from effx_dist.checkpoint.tools.compress.content import ReadOptions
from effx_dist.checkpoint.tools.compress.run import CompressReport, compress_series
