"""Start a script that uses Megatron-core on a machine without a GPU.

python tests/megatron_launch.py SCRIPT ARGUMENTS...
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests import megatron_shim  # noqa: F401  before megatron

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
