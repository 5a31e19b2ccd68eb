"""Loaders carry out a sample plan: one file a backend, one protocol (`base`), one conformance suite in tests/."""
