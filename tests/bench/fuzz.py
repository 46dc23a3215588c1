"""Read mutated files and count what becomes of them.

`nice python tests/bench/fuzz.py` reads 10,000: FASTA, FASTQ, Parquet, YAML and taxonomy tables. For
each, every record must be used or rejected with a code, or the run end with the product's own
error. `--case fasta 17` writes one case and shows what happens.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzzing import KINDS, OUTCOMES, read_case, run_cases, write_case


def main():
    """Print the counts by kind of file and of outcome, and each case that went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.case:
            path = write_case(folder, options.case[0], int(options.case[1]))
            print(Path(path).read_bytes(), *read_case(options.case[0], path), sep="\n")
            return 0
        numbers = range(options.first, options.first + -(-options.cases // len(KINDS)))
        cases = [(kind, number) for number in numbers for kind in KINDS][: options.cases]
        counts, num_bad, begun = Counter(), 0, time.monotonic()
        for kind, number, outcome, detail in run_cases(cases, folder):
            counts[kind, outcome] += 1
            if outcome in ("other error", "hang", "crash"):
                num_bad += 1
                print(f"{kind} {number}: {outcome}\n{detail}", flush=True)
    print(f"{'':10}" + "".join(f"{outcome:>22}" for outcome in OUTCOMES))
    for kind in KINDS:
        print(f"{kind:10}" + "".join(f"{counts[kind, outcome]:>22,}" for outcome in OUTCOMES))
    total = [sum(counts[kind, outcome] for kind in KINDS) for outcome in OUTCOMES]
    print(f"{'all':10}" + "".join(f"{count:>22,}" for count in total))
    print(f"{len(cases):,} cases in {time.monotonic() - begun:.0f} seconds")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
