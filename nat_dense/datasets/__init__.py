"""Data sets: the generated shapes, for trying everything out without a download."""
