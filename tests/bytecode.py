"""Importing this keeps bytecode also where the environment forbids it: in the folder of the virtual
environment, not beside the sources. The tests start hundreds of processes that import torch, and
each of them would compile it anew, which takes most of its time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = str(Path(sys.prefix, "bytecode"))

if sys.dont_write_bytecode:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", FOLDER)
    sys.dont_write_bytecode = False
