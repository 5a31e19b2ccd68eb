"""The configuration: `schema` says what there is, `load` reads it from YAML and the command line. No heavy imports."""

from mvp_fast.config.schema import Config

__all__ = ["Config"]
