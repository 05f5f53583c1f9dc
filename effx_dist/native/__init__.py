"""Native code: C++ built once per machine (library.py), and what the checkpoint uses of it (excp.py).

Everything here is optional: its callers hold the same arithmetic in numpy or torch, bit for bit.
"""
