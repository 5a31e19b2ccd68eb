"""Reading a configuration: strict YAML, then dotted command-line overrides.

Strict means that an unknown key or a value of the wrong type is an error that names the file and the nearest valid
key. YAML goes through `yaml.safe_load`, values through cattrs, overrides through tyro.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from mvp_fast.config.check import check_config
from mvp_fast.config.schema import Config
from mvp_fast.errors import ConfigError

Settings = TypeVar("Settings")  # a dataclass of sections, such as Config


def load_config(path: str | Path) -> Config:
    """Read a YAML file over the defaults of pre-training; see `load_settings`."""
    return load_settings(Config, path)


def load_settings(kind: type[Settings], path: str | Path) -> Settings:
    """Read a YAML file over the defaults of `kind`.

    Raises:
        ConfigError: the file is missing or not YAML, or has an unknown key or a value of the wrong type.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"The config file can't be read: {reason}", where=str(path), fix="Check the path") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"The config file is not valid YAML: {error}", where=str(path)) from error
    return settings_from_dict(kind, values, source=str(path))


def config_from_dict(values: dict[str, Any], *, source: str) -> Config:
    """Build a `Config` from nested dictionaries; `source` names their origin in messages."""
    return settings_from_dict(Config, values, source=source)


def settings_from_dict(kind: type[Settings], values: dict[str, Any], *, source: str) -> Settings:
    """Build settings of `kind` from nested dictionaries; `source` names their origin in messages."""
    if not isinstance(values, dict):
        raise ConfigError("The config file must hold a mapping of sections", where=source)
    _check_keys(values, kind, "", source)
    import cattrs

    try:
        return typing.cast(Settings, _converter().structure(values, kind))
    except cattrs.BaseValidationError as error:
        reasons = "; ".join(cattrs.transform_error(error, path="config", format_exception=lambda e, _: str(e)))
        raise ConfigError(f"A value has the wrong type: {reasons}", where=source) from error


def config_to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists and scalars, fit for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast("dict[str, Any]", plain(dataclasses.asdict(config)))


def config_to_yaml(config: Any) -> str:
    """A configuration as YAML that `load_config` reads back to an equal object."""
    import yaml

    return yaml.safe_dump(config_to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def save_config(config: Any, path: Path) -> None:
    """Write the configuration as YAML: beside, then renamed, so that no reader sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(config_to_yaml(config), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only after an error


def parse_overrides(config: Config, argv: list[str], prog: str, description: str) -> Config:
    """Apply `--section.field value` arguments to `config` and check the result; see `override`."""
    parsed = override(config, argv, prog, description)
    check_config(parsed)
    return parsed


def override(settings: Settings, argv: list[str], prog: str, description: str) -> Settings:
    """Apply `--section.field value` arguments to `settings`, unchecked.

    A wrong argument prints what is wrong, with the nearest valid name, and exits with 2 (tyro).
    """
    import tyro

    options = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(type(settings), args=argv, default=settings, prog=prog, description=description, config=options)


def _field_types(section: type) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def _dotted_names(section: type, prefix: str = "") -> Iterator[str]:
    for name, kind in _field_types(section).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind):
            yield from _dotted_names(typing.cast(type, kind), f"{prefix}{name}.")


def _check_keys(values: dict[str, Any], section: type, prefix: str, source: str, whole: type | None = None) -> None:
    kinds, whole = _field_types(section), whole or section
    for key, value in values.items():
        if key not in kinds:
            raise ConfigError(
                f"There is no setting `{prefix}{key}`",
                where=source,
                fix=_nearest(str(key), prefix, list(kinds), whole),
            )
        if dataclasses.is_dataclass(kinds[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"`{prefix}{key}` must be a mapping of settings", where=source)
            _check_keys(value, typing.cast(type, kinds[key]), f"{prefix}{key}.", source, whole)


def _nearest(key: str, prefix: str, here: list[str], whole: type) -> str:
    """The hint for an unknown key: the nearest name in its section, else anywhere, else the section's names."""
    if near := difflib.get_close_matches(key, here, n=1):
        return f"Did you mean `{prefix}{near[0]}`?"
    everywhere = {name.rsplit(".", 1)[-1]: name for name in _dotted_names(whole)}
    if near := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.75):
        return f"Did you mean `{everywhere[near[0]]}`?"
    return f"`{prefix.rstrip('.') or 'The file'}` has: {', '.join(here)}"


def _converter() -> Any:
    """A cattrs converter that converts nothing silently: no 2.5 to 2, no "no" to True, no 3 to "3"."""
    import cattrs

    def exactly(kind: type, name: str) -> Any:
        def hook(value: Any, _: Any) -> Any:
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise TypeError(f"expected {name}, got {value!r}")
            return value

        return hook

    def number(value: Any, _: Any) -> float:
        # YAML 1.1 reads 1e-5 (no dot) as text; float() takes it, and refuses what is no number.
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError(f"expected a number, got {value!r}")
        return float(value)

    def optional_int(value: Any, kind: Any) -> int | None:
        return None if value is None else typing.cast(int, exactly(int, "a whole number")(value, kind))

    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(bool, exactly(bool, "true or false"))
    converter.register_structure_hook(int, exactly(int, "a whole number"))
    converter.register_structure_hook(str, exactly(str, "text"))
    converter.register_structure_hook(float, number)
    converter.register_structure_hook(int | None, optional_int)
    return converter
