"""`python -m effx_dist.cli` is `effx`."""

from effx_dist.cli import app

app(prog_name="effx")
