"""Where bytes lie: local folders and object stores, the folders of steps in them, tags, ownership.

Imports nothing else of checkpoint/. Begin with location.py, then steps.py.
"""
