"""Tiling, enhancement, fusion and readout: a pure function and a thin module each."""
