"""What classes several sites have together.

Input: the labelled sequences of a site; then the files of all sites. Output: label spaces, and the
names that sites place differently. Invariants: only names and counts are written; the result does
not depend on the order of the sites.
"""

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, InputError
from ..options import LabelUnionConfig, SiteLabelsConfig
from ..reads.labels import Conflict, LabelSpace, compatible, join_labels, learn_labels
from ..reads.raw import ReadOptions
from ..training.data import read_examples


def write_site_labels(config: SiteLabelsConfig) -> LabelSpace:
    """Write the classes of a site's sequences, however few each has."""
    if not config.train:
        raise InputError("no sequences given; pass --train FILES")
    reading = ReadOptions(columns=config.columns, header_taxonomy=config.header_taxonomy)
    examples = read_examples(config.train, reading, config.taxonomy)
    space, _ = learn_labels(examples.lineages)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    space.save(config.output)
    return space


def unite(config: LabelUnionConfig) -> tuple[LabelSpace, list[str]]:
    """Write the classes of all sites together; returns them, and a line for each conflict.

    Raises:
        ConfigError: no site, or one of them twice.
        InputError: a file is not a label space, or no class has enough sequences.
    """
    if not config.sites:
        raise ConfigError("no sites given; pass the labels file of each site")
    refuse_twice(config.sites)
    spaces = [LabelSpace.load(path) for path in config.sites]
    union, conflicts = join_labels(spaces, config.min_sequences)
    if not any(union.num_classes):
        raise InputError(
            f"no class has {config.min_sequences} sequences at all sites together; lower "
            "--min-sequences"
        )
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    union.save(config.output)
    return union, [_tell(conflict, config.sites, spaces) for conflict in conflicts]


def refuse_twice(paths: Sequence[str]) -> None:
    """ConfigError if a path is given twice."""
    seen = set()
    for path in paths:
        if Path(path).resolve() in seen:
            raise ConfigError(f"{path} is given twice; a site counts once")
        seen.add(Path(path).resolve())


def _tell(conflict: Conflict, sites: Sequence[str], spaces: Sequence[LabelSpace]) -> str:
    """A name, each of its sets of ancestors, and the sites that have it."""
    told = []
    for chain, text in zip(conflict.ancestors, conflict.ways, strict=True):
        rank = len(chain)
        have = {
            sites[number]
            for number in conflict.rows
            for own in spaces[number].lineages[rank]
            if own[-1] == conflict.name and compatible(own[:-1], chain)
        }
        told.append(f"{text} ({', '.join(sorted(have))})")
    return f"{conflict.rank} {conflict.name!r}: {' | '.join(told)}"
