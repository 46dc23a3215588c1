"""Embed sequences into a LanceDB table: `python -m bioscan_xla.embed --input FILES --db FOLDER`.

Input: options. Output: the table, `rejected.parquet` beside it, and a summary. Invariants: after
any interruption, running the same command again resumes where the table ends.
"""

import sys
from collections.abc import Sequence
from typing import Any

from .cli import accept_old_names, check_keys, run_command
from .options import SAMPLE, EmbedConfig


def run_embedding_pipeline(
    parquet_input_path: str | Sequence[str],
    lancedb_output_path: str,
    google_drive_path: str | None = None,
    checkpoint_enabled: bool = True,
    max_sequences: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Embed sequences into a LanceDB table.

    Args:
        parquet_input_path: what `--input` takes: Parquet, FASTA, FASTQ; globs, folders, URLs.
        lancedb_output_path: database folder or URL.
        google_drive_path: a folder that gets a copy of the database (`--mirror`).
        checkpoint_enabled: commit at least every `commit_minutes`; False commits by rows and at
            the end only. A run can be resumed either way.
        max_sequences: embed at most this many in this run.
        **options: any other field of `bioscan_xla.options.EmbedConfig`.

    Returns:
        `sequences_processed` (records read, including rejected ones), `embeddings_generated`,
        `errors` (records rejected), `total_rows` and `vector_count` (in the table),
        `avg_vector_length` (numbers in a vector), `sample_vector_norm` (mean Euclidean norm of
        some vectors of the table), `seconds`, `sequences_per_second`, `useful_tokens_per_second`,
        `useful_token_fraction`, `windowed` (sequences of several windows), `distinct`, `compiles`,
        `model_flop_utilisation` (None where the device's peak is unknown), `cleaned`, `rejected`
        (by code), `interrupted`, `fingerprint`, `already_done` (records that an earlier run
        embedded or rejected), `usable` (records of the input that the table now has).

    Raises:
        BioscanError: a subclass; the message says what happened, where, and what to do.
    """
    options = accept_old_names(options, "run_embedding_pipeline")
    check_keys(EmbedConfig, list(options), "run_embedding_pipeline")
    config = EmbedConfig(
        input=parquet_input_path,  # type: ignore[arg-type]
        db=lancedb_output_path,
        mirror=google_drive_path,
        max_sequences=max_sequences,
        **options,
    )
    result = embed(config, commit_by_time=checkpoint_enabled) or {}
    failure = result.pop("failure", None)
    if failure is not None:
        raise failure
    return result


def embed(config: EmbedConfig, commit_by_time: bool = True) -> dict[str, Any] | None:
    """Run a config; returns None after a dry run, else what `run_embedding_pipeline` returns.

    The key `failure` is added: the error for files that could not be read in full, or None.
    """
    from .reads.inputs import expand_inputs

    expand_inputs(config.input)  # reports missing files before the heavy imports
    if config.dry_run:
        from .planning.dry_run import describe_embedding

        print(describe_embedding(config))
        return None
    from .embedding.run import embed as run

    return run(config, commit_by_time)


def _work(config: EmbedConfig) -> int:
    from .sample import provide_demo

    provide_demo(config.input, config.model)
    result = embed(config)
    if result is None:
        return 0
    from .embedding.summary import exit_status, summarise

    print(summarise(config, result))
    if result["failure"] is not None:
        print(f"error: {result['failure']}", file=sys.stderr)
    return exit_status(config, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(
        EmbedConfig,
        _work,
        arguments,
        "python -m bioscan_xla.embed",
        on_second_signal="stopped at once; committed rows are kept. Run the same command to resume",
        demo={
            "input": SAMPLE,
            "db": "demo/embeddings.db",
            "model": "bioscan-small",
            "keep": ["marker"],
        },
        demo_note="No options given: embedding the built-in sample (demo/sample.parquet) with the "
        "shipped encoder bioscan-small into demo/embeddings.db. Your own data: "
        "python -m bioscan_xla.embed --input FILES --db FOLDER",
    )


if __name__ == "__main__":
    sys.exit(main())
