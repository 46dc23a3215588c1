"""Options: one frozen dataclass a command, every field a YAML key and a flag.

Enters: a command line (and the YAML it names). Leaves: a checked dataclass. Guaranteed: an
unknown key is refused with the nearest known one; flags win over the YAML.
"""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from .errors import ConfigError

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(frozen=True)
class EmbedConfig:
    """Embed sequences into a LanceDB table of vectors.

    Run it again with the same options to resume: what is in the table is not computed again.
    """

    input: list[str] | str = ()  # type: ignore[assignment]
    """Parquet, FASTA or FASTQ: files, a glob, a folder, or a gs://, s3://, az://, hf:// URL."""

    db: str = "embeddings.db"
    """LanceDB database: a local folder, or a gs:// or s3:// URL."""

    table: str = "embeddings"
    """Name of the table."""

    mirror: str | None = None
    """Folder (a mounted Google Drive, say) that gets a copy of the database every half hour."""

    model: str = "InstaDeepAI/nucleotide-transformer-2.5b-multi-species"
    """Hugging Face id or local folder of a Nucleotide Transformer (version 1)."""

    revision: str | None = None
    """Commit of the model on the hub; by default that of the table, for a new table the newest."""

    adapter: str | None = None
    """Folder of a LoRA adapter, merged into the model."""

    pooling: str = "mean"
    """mean (the model card's recipe), mean_no_special, cls or max."""

    layer: int = -1
    """Hidden state to pool: -1 the last, 0 the embeddings, k the output of layer k."""

    overlap_tokens: int = 100
    """Tokens that neighbouring windows share in sequences longer than the model's 1,000 tokens."""

    device: str = "auto"
    """auto (TPU, then GPU, then CPU), xla, cuda or cpu."""

    dtype: str | None = None
    """bfloat16 or float32; by default bfloat16 where the device multiplies it natively."""

    shard_parameters: bool = False
    """XLA only: divide the weights over the devices, for a model too large for one of them."""

    vector_dtype: str = "float16"
    """float16 or float32: how vectors are stored."""

    store_sequences: bool = True
    """Also store the cleaned sequence."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Column names of the file, where they differ: {dna_sequence: seq, depth: depth_m}."""

    keep: list[str] = ()  # type: ignore[assignment]
    """Further Parquet columns to carry into the table."""

    header_taxonomy: str | None = None
    """Read the lineage from FASTA headers: sintax or silva."""

    min_length_bp: int = 20
    """Shorter sequences are set aside."""

    max_n_fraction: float = 0.5
    """Sequences with a larger share of N are set aside."""

    max_errors: int | None = None
    """Stop when more records than this had to be set aside; by default never."""

    max_sequences: int | None = None
    """Embed at most this many sequences in this run."""

    commit_rows: int = 10_000
    """Commit when this many rows wait."""

    commit_minutes: float = 30.0
    """Commit at least this often."""

    vector_index: bool = False
    """Build a vector index (IVF_RQ, cosine) at the end; worth it from 100,000 rows."""

    wandb: bool = False
    """Report to Weights & Biases (key from WANDB_API_KEY; WANDB_MODE=offline works)."""

    wandb_project: str = "bioscan_xla"
    """Project at Weights & Biases."""

    process_index: int = 0
    """Of several processes that share the input, which this is."""

    process_count: int = 1
    """How many processes share the input."""

    dry_run: bool = False
    """Read a part of the input, print the plan, compute nothing."""

    def __post_init__(self):
        """Normalise and check what needs no file and no device."""
        inputs = [self.input] if isinstance(self.input, str | Path) else list(self.input)
        object.__setattr__(self, "input", [str(item) for item in inputs])
        object.__setattr__(self, "keep", list(self.keep))
        choices = {
            "pooling": ("mean", "mean_no_special", "cls", "max"),
            "device": ("auto", "xla", "cuda", "cpu"),
            "dtype": (None, "bfloat16", "float32"),
            "vector_dtype": ("float16", "float32"),
            "header_taxonomy": (None, "sintax", "silva"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                names = ", ".join(name for name in known if name)
                raise ConfigError(f"{key} {getattr(self, key)!r} is unknown; choose {names}")
        lowest = {
            "min_length_bp": 1,
            "commit_rows": 1,
            "overlap_tokens": 0,
            "process_count": 1,
            "max_sequences": 1,
            "max_errors": 0,
        }
        for key, least in lowest.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key} is {value}; it must be at least {least}")
        if not 0 <= self.process_index < self.process_count:
            raise ConfigError(
                f"process_index {self.process_index} must lie between 0 and process_count - 1, "
                f"which is {self.process_count - 1}"
            )
        if not 0 <= self.max_n_fraction <= 1:
            raise ConfigError(f"max_n_fraction is {self.max_n_fraction}; it is a share from 0 to 1")
        if self.commit_minutes <= 0:
            raise ConfigError(f"commit_minutes is {self.commit_minutes}; it must be above 0")


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


def load_yaml(config_class: type[T], path: str | Path, **overrides: Any) -> T:
    """Read a YAML into a config, as the command does."""
    words = [f"--config={path}"]
    config = parse(config_class, words, "config")
    return dataclasses.replace(config, **overrides)  # type: ignore[type-var]


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
