"""A checkpoint as what others read: torch.distributed.checkpoint, one torch file, Hugging Face
shards, DeepSpeed universal.

Read content.py first (what is in a checkpoint, under the names of a model and its optimizer), then
the writer of a target. Nothing but torch and safetensors is needed.
"""

from __future__ import annotations

from effx_dist.checkpoint.tools.convert.run import TARGETS, ConvertOptions, convert_checkpoint
