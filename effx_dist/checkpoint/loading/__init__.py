"""A load, from a committed step to the live state; and a chain that begins with the run's own seed.

Imports saving/ and the floors below it. Begin with restore.py, then dcp_reader.py.
"""
