"""Read by every Python that has this folder on its path: the processes that PyTorch's tests spawn, too."""

import os

if os.environ.get("EFFX_FOREIGN") == "ours":
    from tests.foreign import dcp_shim  # noqa: F401  it changes torch.distributed.checkpoint
