"""Recipes: a TOML file and `section.key=value` overrides make a config of any class.

Properties that hold:
- Keys are the fields of the config class and of the classes it nests, pydantic models or dataclasses; none is listed here.
- A key that does not exist is refused with the nearest one that does. A wrong value is refused with its key and the remedy.
- Of two keys that exclude each other (`EXCLUSIVE` of the config class), an override drops the recipe's other one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

from reelmae.pipeline.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
Config = TypeVar("Config", bound=BaseModel)


def load(config_class: type[Config], recipe: str | None, overrides: Sequence[str] = ()) -> Config:
    """A config from a recipe (a path, or a name in recipes/; None: the defaults) and overrides `section.key=value`.

    Values are TOML; quotes around text may be left out. ConfigError names the key or value and the remedy.
    """
    keys = list_keys(config_class)
    tree = _read_toml(recipe, keys) if recipe is not None else {}
    rivals: dict[str, str] = {}
    for a, b in getattr(config_class, "EXCLUSIVE", ()):
        rivals |= {a: b, b: a}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: is not an override; write section.key=value, such as run.steps=1000")
        _check_key(key, keys, "override")
        _set(tree, key, _parse_value(text, keys[key]))
        if key in rivals:
            _drop(tree, rivals[key])
    try:
        return config_class.model_validate(tree)
    except ValidationError as e:
        raise explain(e) from e


def list_keys(config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every key `section.key` of a config class, with the type of its value."""
    if issubclass(config_class, BaseModel):
        types = {name: field.annotation for name, field in config_class.model_fields.items()}
    else:
        hints = get_type_hints(config_class)
        types = {field.name: hints[field.name] for field in fields(config_class)}
    keys: dict[str, Any] = {}
    for name, kind in types.items():
        section = next((k for k in _alternatives(kind) if _is_section(k)), None)
        keys |= {prefix + name: kind} if section is None else list_keys(section, f"{prefix}{name}.")
    return keys


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (`section.key`, value) of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def explain(e: ValidationError, prefix: str = "") -> ConfigError:
    """The first of pydantic's complaints in one line: key, value, what is wanted."""
    error = e.errors()[0]
    *parents, last = [*filter(None, prefix.split(".")), *error["loc"]] or [""]
    key = ".".join(str(part) for part in (*parents, last))
    if error["type"] == "value_error":  # our own message: it names the value, and perhaps its section
        message = str(error["ctx"]["error"])
        if message.startswith((f"{last}.", f"{last}=")):
            key = ".".join(str(part) for part in parents)
        return ConfigError(f"{key}.{message}" if key else message)
    if error["type"] == "missing" and isinstance(last, int):  # a tuple that is too short
        return ConfigError(f"{'.'.join(map(str, parents))}={_shown(error['input'])}: give more than {last} values")
    if error["type"] == "missing":
        listed = any(isinstance(part, int) for part in parents)  # one of a list has no key of its own
        return ConfigError(f"{key}: is not given; add {'it' if listed else f'{key}=VALUE'}")
    return ConfigError(f"{key}={_shown(error['input'])}: {error['msg'].lower()}")


def _shown(value: Any) -> Any:
    """The value, unless it is a part of a config with storage options in it, which may be secrets."""
    return "(not shown)" if "storage_options" in str(value) else value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone; without Annotated."""
    if get_origin(kind) is Annotated:
        return _alternatives(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(a for member in get_args(kind) for a in _alternatives(member))
    return (kind,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))


def _read_toml(recipe: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    named = RECIPES / f"{recipe}.toml"
    path = named if named.is_file() else Path(recipe)
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ConfigError(f"{recipe}: no such recipe; give the path of a TOML file, or one of {names}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: is not valid TOML: {e}") from e
    for key, _ in leaves(tree):
        _check_key(key, keys, str(path))
    return tree


def _check_key(key: str, keys: Mapping[str, Any], where: str) -> None:
    """ConfigError where there is no such key, with the nearest one."""
    if key in keys:
        return
    by_last_name = {k.rpartition(".")[2]: k for k in keys}  # a key without its section is a likely slip
    near = difflib.get_close_matches(key, keys, 1, 0.6) or [
        by_last_name[name] for name in difflib.get_close_matches(key.rpartition(".")[2], by_last_name, 1, 0.6)
    ]
    sections = ", ".join(dict.fromkeys(k.partition(".")[0] for k in keys))
    hint = f"did you mean {near[0]}?" if near else f"sections: {sections}"
    raise ConfigError(f"{key}: no such key ({where}); {hint}")


def _parse_value(text: str, kind: Any) -> Any:
    """A TOML value, or the text itself where the key holds text or the text is not TOML."""
    holds_text = {*_alternatives(kind)} - {type(None)} == {str}
    if holds_text and not text.startswith(('"', "'")):
        return text  # a folder named 2024 is not a number
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[name] = value


def _drop(tree: dict[str, Any], key: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
    tree.pop(name, None)
