"""One model from several sites whose sequences stay where they are.

Input: labelled sequences at each site. Output: `labels` the classes of a site, `labels union` those
of all, `train` a site's model and the folder `share` that it sends, `merge` the common model.
How the files travel between the sites is up to them.
"""

import sys
from collections.abc import Sequence

from .cli import run_command
from .options import LabelUnionConfig, MergeConfig, SiteConfig, SiteLabelsConfig
from .reads.lineages import RANKS

_PROG = "python -m bioscan_xla.federate"
_USAGE = f"""usage: {_PROG} labels --train FILES --output SITE.json
       {_PROG} labels union SITE.json ... --output UNION.json
       {_PROG} train --site NAME --train FILES --labels UNION.json --output FOLDER
       {_PROG} merge FOLDER/share ... --labels UNION.json --output MODEL

Train one model at several sites; only names, counts and weights leave a site.
`{_PROG} train --help` and so on list the options."""


def _labels(config: SiteLabelsConfig) -> int:
    from .federation.agreement import write_site_labels

    space = write_site_labels(config)
    print(f"{config.output}: {_classes(space.num_classes)}; it holds names and counts only")
    return 0


def _union(config: LabelUnionConfig) -> int:
    from .federation.agreement import unite

    union, conflicts = unite(config)
    for line in conflicts:
        print(f"several lineages: {line}")
    if conflicts:
        print("each is a class of its own; if it is an error and no homonym, mend it at the site")
    print(f"{config.output}: {_classes(union.num_classes)}")
    return 0


def _train(config: SiteConfig) -> int:
    from .errors import InputError
    from .finetune import choose_backend, summary
    from .reads.inputs import expand_inputs

    if not config.train:
        raise InputError("no training sequences given; pass --train FILES")
    expand_inputs(config.train)  # reports missing files before the heavy imports
    choose_backend(config.device)
    from .federation.site import train_site

    result, share = train_site(config)
    if result["process_index"] == 0:
        print(summary(result))
    if share:
        print(f"send {share}; it holds weights, names and counts, and no sequence")
    return 128 + result["interrupted"] if result["interrupted"] else 0


def _merge(config: MergeConfig) -> int:
    from .federation.merging import merge

    used, left_out = merge(config)
    total = sum(site.sequences for site in used)
    for site in used:
        print(f"{site.name}: {site.sequences:,} sequences, weight {site.sequences / total:.3f}")
    for gone in left_out:
        print(f"left out: {gone.name}: {gone.reason}")
    sites = "1 site" if len(used) == 1 else f"{len(used)} sites"
    print(f"{config.output}: {sites}; the next round begins with --start {config.output}")
    return 0


def _classes(num_classes: Sequence[int]) -> str:
    return ", ".join(f"{n} {rank}" for n, rank in zip(num_classes, RANKS, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb, rest = (words[0], words[1:]) if words else ("", [])
    if verb == "labels" and rest[:1] == ["union"]:
        prog = f"{_PROG} labels union"
        return run_command(LabelUnionConfig, _union, rest[1:], prog, positionals=("sites",))
    if verb == "labels":
        return run_command(SiteLabelsConfig, _labels, rest, f"{_PROG} labels")
    if verb == "train":
        return run_command(SiteConfig, _train, rest, f"{_PROG} train")
    if verb == "merge":
        return run_command(MergeConfig, _merge, rest, f"{_PROG} merge", positionals=("sites",))
    asked = {"-h", "--help"} & set(words)
    print(_USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 1


if __name__ == "__main__":
    sys.exit(main())
