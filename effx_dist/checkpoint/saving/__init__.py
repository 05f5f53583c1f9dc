"""A save, from the live state to the commit: planned, measured, written, published, and what is kept.

Imports state/, format/ and storage/. Begin with saver.py, then writer.py and decision.py.
"""
