"""Command line and YAML to a config: every field of the dataclass is a key and a flag.

Enters: a command line (and the YAML it names). Leaves: a checked dataclass. Guaranteed: an
unknown key is refused with the nearest known one; flags win over the YAML.
"""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from .errors import ConfigError

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def check_keys(config_class: type, keys: Sequence[str], where: str) -> None:
    """Refuse a key that is no field of the dataclass, naming the nearest that is."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}: there is no option {key!r}; {hint}")


def parse(config_class: type[T], arguments: Sequence[str] | None, prog: str) -> T:
    """Parse a command line into a config.

    Flags may be written with dashes or underscores; `--config FILE` reads a YAML.

    Raises:
        ConfigError: an unknown key or a value that cannot be.
        SystemExit: `--help`, `--print_config`, or a flag without its value.
    """
    words = _normalise(config_class, sys.argv[1:] if arguments is None else arguments)
    flags = [word[2:].split("=")[0].split(".")[0] for word in words if word.startswith("--")]
    parser = _Parser(
        prog=prog,
        description=config_class.__doc__,
        exit_on_error=False,
        usage="%(prog)s [--config FILE] [--OPTION VALUE ...]",
    )
    parser.add_argument("--config", action="config", help="YAML file of options; flags win over it")
    parser.add_class_arguments(config_class, as_group=False)
    own = ("config", "help", "print_config")
    check_keys(config_class, [flag for flag in flags if flag not in own and flag], "command line")
    for path in _named_configs(words):
        check_keys(config_class, list(_read_yaml(path)), path)
    try:
        values = parser.parse_args(words)
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, SystemExit):
            raise
        raise ConfigError(str(error)) from error
    return build(config_class, values)


def build(config_class: type[T], values: Namespace) -> T:
    """Make the dataclass from parsed values."""
    names = [field.name for field in dataclasses.fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: values[name] for name in names})


class _Parser(ArgumentParser):
    def format_help(self, *arguments: Any) -> str:
        """Show flags as people type them, with dashes."""
        text = super().format_help(*arguments)
        text = re.sub(r"(?<=--)[a-z]+(?:_[a-z]+)+", lambda m: m.group().replace("_", "-"), text)
        return re.sub(r", --[a-z-]+\+ \S+", "", text).replace(" {true,false}", "")


def _normalise(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Write a command line as the parser wants it: `--key=value`, once a key.

    Dashes become underscores, a switch alone means true, several words after a list option are a
    list, and `name=value` words after a mapping option are a mapping.
    """
    kinds = {f.name: getattr(f.type, "__name__", "") for f in dataclasses.fields(config_class)}
    kinds |= {f.name: str(f.type) for f in dataclasses.fields(config_class) if f.type is not bool}
    groups: list[list[str]] = []
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            groups.append(["--" + name[2:].replace("-", "_"), *([value] if equals else [])])
        elif groups and groups[-1][0] != "":
            groups[-1].append(word)
        else:
            groups.append(["", word])
    result = []
    for flag, *values in groups:
        kind = kinds.get(flag[2:], "")
        if kind == "bool" and not values:
            values = ["true"]
        elif kind.startswith("list[") and values and not values[0].startswith("["):
            values = [json.dumps(values)]
        elif kind.startswith("dict[") and values and not values[0].startswith("{"):
            values = [json.dumps(dict(value.partition("=")[::2] for value in values))]
        result += [f"{flag}={values[0]}", *values[1:]] if flag and values else [flag, *values]
    return [word for word in result if word]


def _named_configs(arguments: Sequence[str]) -> list[str]:
    return [word.split("=", 1)[1] for word in arguments if word.startswith("--config=")]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML ({error})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold options as `key: value`")
    return values
