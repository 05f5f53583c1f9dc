"""What a run consists of: the names and tensors of a model, its optimizer, and all else that travels with them.

Imports format/ and storage/. Begin with live.py, then training_state.py.
"""
