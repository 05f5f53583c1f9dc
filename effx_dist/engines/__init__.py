"""One file an engine: it draws a shard map, names the groups and wires the engine's own hooks. No
arithmetic."""
