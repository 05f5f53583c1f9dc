"""What the bytes mean: the manifest and its checks, how tensors are coded, data files, the reader.

Imports storage/. Begin with manifest.py, then block_files.py, chunks.py and reader.py.
"""
