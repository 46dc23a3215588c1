"""Run by bench/kill.py to be killed: the embedding command, many commits a second.

Arguments: source, database, model folder, process index, process count, engine. Says "ready" on
standard error when the table is open.
"""

import logging
import sys

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.reads import shares
from bioscan_xla.table.store import Store


def main():
    source, db, model, index, count, engine = sys.argv[1:]
    logging.disable()
    shares.BLOCK_ROWS = 100
    opened = Store.done

    def done(self):
        result = opened(self)
        print("ready", file=sys.stderr, flush=True)
        return result

    Store.done = done
    run_embedding_pipeline(
        source,
        db,
        model=model,
        device="cpu",
        dtype="float32",
        commit_rows=8,
        process_index=int(index),
        process_count=int(count),
        engine=engine,
    )


if __name__ == "__main__":
    main()
