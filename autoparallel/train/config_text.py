"""Configurations as text: TOML files, --section.key=value, the list of all keys, what was resolved.

Every mistake is an error that names the key and, where the key is unknown, the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from autoparallel.train.config import TrainingError
from autoparallel.train.run_config import ModelConfig, RunConfig

__all__ = ["config_to_toml", "known_keys", "read_config", "shipped_configs"]

# Keys of bundled models, which say nothing to others.
_OF_BUNDLED = ("layers", "hidden", "heads", "dropout", "norm", "sentence_order")


def shipped_configs() -> tuple[str, ...]:
    """Return the names of the configurations that come with the package, sorted.

    >>> "gpt-tiny" in shipped_configs()
    True
    """
    folder = resources.files("autoparallel.train").joinpath("configs")
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir()))


def read_config(file: str | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a file, changed by texts such as "--training.steps=10".

    file: the path of a TOML file, the name of a shipped one, or None for the defaults. Raises
    TrainingError for a file that is not there or is no TOML, for keys that there are not, and for
    values of another type or out of range.

    >>> read_config("gpt-tiny", ["--training.steps=7"]).training.steps
    7
    """
    where, table = ("the defaults", {}) if file is None else _read_file(file)
    table = _without_shorthand(table)
    for text in overrides:
        path, value = _override(text)
        _put(table, path, value, text)
    config = _built(RunConfig, table, "", where)
    given = set(table.get("model", {}))
    strange = sorted(given & set(_OF_BUNDLED)) if not config.model.is_bundled else []
    if strange:
        raise TrainingError(
            f"model.{strange[0]} is of the bundled models, and model.kind = {config.model.kind!r}",
            where=where,
            why="sizes of other models are arguments of their own",
            fix="put them under their own names into [model.options]",
        )
    return config


def _read_file(file: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the tables of a file, or of a shipped configuration."""
    path = Path(file)
    content: bytes | None = None
    if not path.exists() and file.removesuffix(".toml") in shipped_configs():
        name = file.removesuffix(".toml") + ".toml"
        content = resources.files("autoparallel.train").joinpath("configs", name).read_bytes()
    try:
        content = path.read_bytes() if content is None else content
        return file, tomllib.loads(content.decode())
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.stem, shipped_configs(), 1)
        raise TrainingError(
            f"no configuration {file!r}",
            why=f"there is no such file, seen from {Path.cwd()}, and none of this name is shipped",
            fix=(f"do you mean {near[0]!r}? " if near else "")
            + f"shipped are {', '.join(shipped_configs())}",
        ) from error
    except OSError as error:
        raise TrainingError(
            f"the configuration {file!r} cannot be read",
            why=error.strerror or str(error),
            fix="name a TOML file",
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise TrainingError(
            f"the configuration {file!r} is no TOML",
            why=str(error),
            fix='texts are in quotes: folder = "out/run"; tables begin with [training]',
        ) from error


def _without_shorthand(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables with `model = "gpt"` written as a table."""
    model = table.get("model")
    return {**table, "model": {"kind": model}} if isinstance(model, str) else dict(table)


def _override(text: str) -> tuple[list[str], Any]:
    """Return the path and the value of one --section.key=value."""
    name, equals, value = text.removeprefix("--").partition("=")
    if not text.startswith("--") or not equals or not name:
        raise TrainingError(
            f"the argument {text!r}",
            why="after the configuration come keys and values",
            fix="write --section.key=value, such as --training.steps=100",
        )
    path = name.replace("-", "_").split(".")
    if path == ["model"]:
        path = ["model", "kind"]
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return path, value  # A text need no quotes here.


def _put(table: dict[str, Any], path: Sequence[str], value: Any, text: str) -> None:
    """Put a value into nested tables."""
    for name in path[:-1]:
        inner = table.get(name, {})
        if not isinstance(inner, dict):
            raise TrainingError(
                f"the argument {text!r}", why=f"{name} is no section", fix="see --help for all keys"
            )
        table[name] = dict(inner)
        table = table[name]
    table[path[-1]] = value


def _built(kind: Any, table: Mapping[str, Any], prefix: str, where: str) -> Any:
    """Return a section, or the whole, from its table. prefix: the section's name and a dot."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        path = prefix + name
        if name not in hints:
            raise _unknown(path, where)
        wanted = hints[name]
        if is_dataclass(wanted):
            if not isinstance(value, Mapping):
                raise TrainingError(
                    f"{path} = {value!r}",
                    where=where,
                    why=f"{path} is a section",
                    fix=f"begin it with [{path}], and put keys below",
                )
            values[name] = _built(wanted, value, f"{path}.", where)
        else:
            values[name] = _typed(path, value, wanted, where)
    try:
        return kind(**values)
    except TrainingError as error:
        what = error.what if "." in error.what.split(" ")[0] else prefix + error.what
        raise TrainingError(what, where=where, why=error.why, fix=error.fix) from None


def _unknown(path: str, where: str) -> TrainingError:
    """Return the error for a key that there is not, which names the nearest one."""
    known = [name for name, _, _ in known_keys()]
    sections = sorted({name.partition(".")[0] for name in known if "." in name})
    last = path.rpartition(".")[2]
    near = difflib.get_close_matches(path, [*known, *sections], 1, 0.7)
    # The right key in the wrong section is nearer than another one of the section.
    near = [name for name in known if name.rpartition(".")[2] == last] or near
    near = near or difflib.get_close_matches(path, [*known, *sections], 1, 0.4)
    return TrainingError(
        f"there is no key {path}",
        where=where,
        why="a key that nothing reads would change nothing",
        fix=f"do you mean {near[0]}? --help lists all" if near else "see --help for all keys",
    )


def _typed(path: str, value: Any, wanted: Any, where: str) -> Any:
    """Return a value as the type of its key has it."""
    good: bool
    if wanted is bool:
        good, words = isinstance(value, bool), "true or false"
    elif wanted is int:
        good, words = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif wanted is float:
        good, words = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        value = float(value) if good else value
    elif wanted is str:
        good, words = isinstance(value, str), "a text"
    elif wanted == tuple[str, ...]:
        good = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        words = "a list of texts"
        value = tuple(value) if good else value
    else:
        good, words = isinstance(value, Mapping), "a table"
        value = dict(value) if good else value
    if not good:
        raise TrainingError(
            f"{path} = {value!r}", where=where, why=f"the key takes {words}", fix=f"give {words}"
        )
    return value


def known_keys() -> Iterator[tuple[str, Any, str]]:
    """Yield the path, the default and the meaning of every key.

    >>> next(known_keys())[:2]
    ('folder', 'out/train')
    """
    yield from _keys(RunConfig(), "")


def _keys(section: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Yield the keys of a section and of those inside of it."""
    for each in fields(section):
        value = getattr(section, each.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{each.name}.")
        else:
            meaning = each.metadata["meaning"]
            among = [name for name in each.metadata["among"] if name]
            yield f"{prefix}{each.name}", value, meaning + (f" ({', '.join(among)})" * bool(among))


def config_to_toml(config: RunConfig) -> str:
    """Return the configuration with all of its keys, as `read_config` reads it.

    >>> config_to_toml(RunConfig()).splitlines()[0]
    'folder = "out/train"'
    """
    lines: list[str] = []
    _write(config, "", lines)
    return "\n".join(lines) + "\n"


def _write(section: Any, path: str, lines: list[str]) -> None:
    """Write a section: its own keys, and then the sections inside of it."""
    inner = []
    for each in fields(section):
        value = getattr(section, each.name)
        name = f"{path}.{each.name}" if path else each.name
        if is_dataclass(value):
            inner.append((name, value))
        elif not (
            isinstance(section, ModelConfig) and each.name in _OF_BUNDLED and not section.is_bundled
        ):
            lines.append(f"{each.name} = {_toml(value)}")
    for name, value in inner:
        lines += ["", f"[{name}]"]
        _write(value, name, lines)


def _toml(value: Any) -> str:
    """Return a value as TOML has it, which is JSON but for tables and some numbers."""
    if isinstance(value, Mapping):
        rows = ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items())
        return "{" + rows + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)
