"""Parses the command line and YAML into a config, and runs every command.

Input: a command line (and the YAMLs it names). Output: a checked dataclass; an exit status.
Invariants: every field of the dataclass is a key and a flag; flags override a YAML in any order and
a later YAML overrides an earlier one; an unknown key is an error that suggests the nearest known
one, a duplicate key in a YAML an error that names both lines; a user error is one line on stderr.
"""

import dataclasses
import difflib
import logging
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser, set_parsing_settings

from .errors import BioscanError, ConfigError

T = TypeVar("T")

log = logging.getLogger("bioscan_xla")

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_COMMAND_LINE = "command line"


def run_command(
    config_class: type[T],
    work: Callable[[T], int],
    arguments: Sequence[str] | None,
    prog: str,
    *,
    on_second_signal: str = "stopped; run the same command again",
    positionals: Sequence[str] = (),
    short: Mapping[str, str] | None = None,
    demo: Mapping[str, Any] | None = None,
    demo_note: str = "",
) -> int:
    """Parse the options of a command and run it; returns the exit status.

    Args:
        config_class: the command's options.
        work: the command; imports what it needs when it begins, and returns the exit status.
        arguments: the command line; by default that of this process.
        prog: what the user typed, for `--help`.
        on_second_signal: what to say when the user leaves at once.
        positionals: options that are given without a flag; the last takes all further words if it
            is a list.
        short: flags of one letter, and the options they mean.
        demo: options to take where the command line is empty.
        demo_note: what that does and how to name one's own data; the first line that is printed.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    log.setLevel(logging.INFO)
    # What one library will change for another is nothing that the user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if not words and demo is not None:
            print(demo_note, flush=True)
            return work(config_class(**demo))
        return work(parse(config_class, words, prog, positionals, short))
    except BioscanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has left; what was to be done is done
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (flushed when the interpreter ends)
        return 141
    except PermissionError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(on_second_signal, file=sys.stderr)
        return 130


def check_keys(config_class: type, keys: Sequence[str], where: str) -> None:
    """Refuse a key that is not a field of the dataclass, and suggest the nearest one."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.7)
            near = near or [name for name in known if key in name.split("_")][:1]
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"{where}: there is no option {key!r}; {hint}")


def accept_old_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options under their current names; an old name is accepted with a warning."""
    values = dict(values)
    if "wandb" in values:
        tracker = "none" if str(values.pop("wandb")).lower() == "false" else "wandb"
        if "tracker" in values:
            raise ConfigError(f"{where}: wandb is the old name of tracker; remove wandb")
        log.warning("%s: the option wandb is now tracker: %s", where, tracker)
        values["tracker"] = tracker
    return values


def parse(
    config_class: type[T],
    arguments: Sequence[str] | None,
    prog: str,
    positionals: Sequence[str] = (),
    short: Mapping[str, str] | None = None,
) -> T:
    """Parse a command line into a config.

    Flags may be written with dashes or underscores; `--config FILE` reads a YAML.

    Raises:
        ConfigError: an unknown key or an invalid value.
        SystemExit: `--help` or `--print-config`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if "-h" in words or "--help" in words:
        _print_help(config_class, prog, positionals)
    flags, configs, prints = _read_words(config_class, words, positionals, short or {})
    places = [(path, read_yaml(path)) for path in configs] + [(_COMMAND_LINE, flags)]
    fields: tuple[dataclasses.Field, ...] = dataclasses.fields(config_class)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    places_of: dict[str, str] = {}
    for where, given in places:
        if any(field.name == "tracker" for field in fields):
            given = accept_old_names(given, where)
        check_keys(config_class, list(given), where)
        values |= _convert(config_class, given, where)
        places_of |= dict.fromkeys(given, where)
    for field in fields:
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise ConfigError(f"{field.name} is missing; see {prog} --help")
    try:
        config = config_class(**values)
    except ConfigError as error:  # its message begins with the option; add where that was set
        where = places_of.get(str(error).split()[0], _COMMAND_LINE)
        raise error if where == _COMMAND_LINE else ConfigError(f"{where}: {error}") from error
    if prints:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), end="")  # type: ignore[call-overload]
        raise SystemExit(0)
    return config


def _read_words(
    config_class: type, words: Sequence[str], positionals: Sequence[str], short: Mapping[str, str]
) -> tuple[dict[str, Any], list[str], bool]:
    """Options, YAML files and whether `--print-config` was on the command line.

    A switch alone means true, several words after a list option are a list, and `name=value` words
    after a mapping option are a mapping. If an option is given twice, the last one wins.
    """
    hints = typing.get_type_hints(config_class)
    groups: list[list[str]] = [[""]]
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            groups.append([name.replace("-", "_"), *([value] if equals else [])])
        elif word in short:
            groups.append([short[word]])
        else:
            groups[-1].append(word)
    values: dict[str, Any] = {}
    configs: list[str] = []
    free: list[str] = []
    for name, *given in groups:
        kind = _bare(hints.get(name))
        if kind in (list, dict) and given and given[0][:1] not in ("[", "{"):
            values[name] = given if kind is list else _pairs(name, given)
            continue
        if kind is bool and positionals and given and given[0] not in ("true", "false"):
            given = ["true", *given]  # a switch alone; what follows is positional
        free += given if not name else given[1:]
        if name == "config" and given:
            configs.append(given[0])
        elif name and name != "print_config":
            check_keys(config_class, [] if name in ("config", "wandb") else [name], _COMMAND_LINE)
            if not given and kind is not bool and name != "wandb":
                raise ConfigError(f"--{name.replace('_', '-')} needs a value")
            values[name] = given[0] if given else "true"
    for name in positionals:
        if free:
            is_list = _bare(hints[name]) is list
            values[name], free = (free, []) if is_list else (free[0], free[1:])
    if free:
        raise ConfigError(f"{free[0]!r} belongs to no option; write --OPTION {free[0]}")
    return values, configs, any(name == "print_config" for name, *_ in groups)


def _pairs(name: str, words: Sequence[str]) -> dict[str, str]:
    for word in words:
        if "=" not in word:
            raise ConfigError(f"--{name.replace('_', '-')} {word}: write it as NAME=VALUE")
    return dict(word.partition("=")[::2] for word in words)


def _bare(hint: Any) -> Any:
    """The first type of a hint: `list` of `list[str] | str`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return typing.get_origin(options[0]) or options[0]


def _convert(config_class: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values converted to the types of the fields, by jsonargparse."""
    hints = typing.get_type_hints(config_class)
    converted = {}
    for key, value in values.items():
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{key}", type=hints[key])
        try:
            converted[key] = parser.parse_object({key: value})[key]
        except Exception as error:  # its own message is about its parser
            option = f"--{key.replace('_', '-')}" if where == _COMMAND_LINE else f"{where}: {key}"
            raise ConfigError(
                f"{option} is {value!r}; it must be {_describe(hints[key])}"
            ) from error
    return converted


def _describe(hint: Any) -> str:
    """A type in plain words."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text (in a YAML, put numbers that are meant as text in quotes)",
        type(None): "null",
    }
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return "a list of numbers" if item is float else "a list of text"
    if typing.get_origin(hint) is dict:
        return "pairs, in a YAML as {NAME: VALUE}, on the command line as NAME=VALUE"
    return names.get(hint, str(hint))


def _print_help(config_class: type, prog: str, positionals: Sequence[str]) -> NoReturn:
    """Print the options and what they mean, spelled with dashes."""
    named = " ".join(name.upper() for name in positionals)
    usage = " ".join(filter(None, ["%(prog)s", named, "[--config FILE] [--OPTION VALUE ...]"]))
    parser = ArgumentParser(prog=prog, description=config_class.__doc__, usage=usage)
    parser.add_argument("--config", help="YAML file of options; flags win over it")
    parser.add_argument("--print_config", action="store_true", help="print the options as YAML")
    meanings = {item.arg_name: item.description for item in parse_from_object(config_class).params}
    for name in positionals:
        parser.add_argument(name, metavar=name.upper(), help=meanings[name])
    parser.add_class_arguments(config_class, as_group=False, skip=set(positionals))
    text = parser.format_help()
    text = re.sub(r"(?<=--)[a-z]+(?:_[a-z]+)+", lambda m: m.group().replace("_", "-"), text)
    print(re.sub(r", --[a-z-]+\+ \S+", "", text).replace(" {true,false}", ""), end="")
    raise SystemExit(0)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a duplicate key in a mapping."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if key in lines:
            raise ConfigError(
                f"{loader.name}: {key!r} is set twice, in lines {lines[key]} and {line}; delete one"
            )
        lines[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def read_yaml(path: str) -> dict[str, Any]:
    """Options of a YAML file.

    Raises:
        ConfigError: it cannot be read, is not YAML, has a key twice, or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold options as `key: value`")
    return {str(key): value for key, value in values.items()}
