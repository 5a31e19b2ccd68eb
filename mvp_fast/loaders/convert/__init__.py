"""Data sets written in formats that load faster than image files: one module a format."""
