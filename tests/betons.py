"""Betons for tests, and whether FFCV is there to write and read them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mvp_fast.samples.index import Index

HAVE_FFCV = importlib.util.find_spec("ffcv") is not None
needs_ffcv = pytest.mark.skipif(not HAVE_FFCV, reason="FFCV is not installed: make install says why")


def make_beton(index: Index, folder: Path, mode: str = "mixed", side: int = 160, quality: int = 90) -> Index:
    """The index of a beton of these images, written in this process."""
    from mvp_fast.loaders.convert.beton import write_beton
    from mvp_fast.loaders.convert.beton_parts import Form

    report = write_beton(index, folder / "set.beton", Form(mode, side, quality), workers=1)
    return Index.open(report.index)
