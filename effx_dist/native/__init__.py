"""Native code: C++ built once per machine (library.py), and what checkpoints and codecs use of it (kernels.py).

Everything here is optional: its callers hold the same arithmetic in numpy or torch, bit for bit.
"""
