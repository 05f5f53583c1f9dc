"""What mpirun says to the processes that it starts, in environment variables.

Read by the option of the `effx` command that has them, and by the launch scripts; a scheduler may
set them for a shell, too, with the size 1. Imports nothing.
"""

from __future__ import annotations

MPI_SIZE = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]
"""How many there are: Open MPI; MPICH and what descends from it (Intel MPI, Cray MPICH, MVAPICH)."""
MPI_RANK = ["OMPI_COMM_WORLD_RANK", "PMI_RANK"]
"""Which of them this one is."""
