"""Lossless codecs: bytes to bytes and symbols to bytes. numcodecs finds them by entry point."""

from effx_dist.codecs.planes import BytePlanes
from effx_dist.codecs.symbols import (
    SparseSymbols,
    SymbolStreams,
    pack,
    pack_inside,
    unpack,
    unpack_inside,
    unpack_streams,
)
