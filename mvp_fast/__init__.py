"""mvp_fast: pre-training of vision transformers on masked images, with CLIP features as targets (MVP, 2203.05175).

The rooms, highest first; imports run downward only:

    cli -> evaluate -> train -> export -> objective -> models -> loaders -> samples -> config -> errors

`mvp_kernels` (folder kernels/) stands beside them and imports nothing of mvp_fast.
"""

__version__ = "0.1.0"
