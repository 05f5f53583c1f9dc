"""What people and scripts do with checkpoints that are there: look, verify, compare, convert, compress, compact.

Imports every other floor of checkpoint/. Begin with inspect.py, then verify.py.
"""
