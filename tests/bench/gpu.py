"""All that is claimed of a GPU, in one call; nothing of it has been measured yet.

`python tests/bench/gpu.py` makes the 2.5B geometry of Nucleotide Transformer with random weights in
bfloat16 and prints, for mixed lengths of 150 to 5,994 bp: sequences a second and the share of the
GPU's measured matrix-multiply peak (real tokens only), beside sentence-transformers at its best
batch size and Hugging Face's pipeline, with the least cosine to the latter in float32; peak memory
beside the weights' size of `embed --dry-run`; then a fine-tuning step beside the Hugging Face
Trainer with the same LoRA, heads, loss and batch. Ways are timed in turn after a round that is not
counted, and the best of `--rounds` counts. sentence-transformers takes part where it is installed.

`python tests/bench/gpu.py --sequences 256 --training-sequences 64 --rounds 1` is the short form,
meant to take about two minutes on a GPU of 80 GB; the models are all on it at once, 35 GiB of
weights. Without a GPU it says so and ends with status 2.
"""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import training
from embedding import mixed_sequences

from bioscan_xla.encode.architecture import esm_config
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import prepare_for, run_jobs
from bioscan_xla.encode.packing import Totals
from bioscan_xla.encode.runtime import memory_bytes, open_device, peak_flops
from bioscan_xla.planning.dry_run import count_parameters
from bioscan_xla.reads.tokens import save_tokenizer

GOALS = """goals: 60 % of peak; 1.3 times sentence-transformers; 5 times the pipeline; in training
1.5 times the Trainer"""


def write_model(folder, options):
    """Random weights in bfloat16, made on the device."""
    from transformers import EsmForMaskedLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            model = EsmForMaskedLM(esm_config(options.hidden, options.layers, options.heads))
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def ours(folder, device):
    """From sequences to vectors, tokenization included; and what was computed."""
    encoder = load_encoder(folder, device=device)

    def embed(sequences):
        totals = Totals()
        ((_, vectors, _),) = run_jobs(encoder, [prepare_for(encoder, 0, None, sequences)], totals)
        embed.flops = encoder.flops(totals.useful_tokens, totals.squared_tokens)
        return vectors

    return embed


def hugging_face_pipeline(folder, device, dtype, batch_size):
    """The feature-extraction pipeline, mean over real tokens."""
    from transformers import pipeline

    extract = pipeline("feature-extraction", model=folder, device=device, dtype=dtype)
    tokenizer = extract.tokenizer

    def embed(sequences):
        lengths = [len(tokenizer(sequence)["input_ids"]) for sequence in sequences]
        states = extract(sequences, batch_size=batch_size, return_tensors=True)
        pairs = zip(states, lengths, strict=True)
        return np.stack([state[0, :length].float().mean(0).numpy() for state, length in pairs])

    return embed


def sentence_transformers(folder, device, batch_size):
    """sentence-transformers' own encode() in bfloat16, which sorts by length."""
    from sentence_transformers import SentenceTransformer, models

    words = models.Transformer(folder, max_seq_length=1000, model_args={"dtype": torch.bfloat16})
    pooling = models.Pooling(words.get_word_embedding_dimension())
    model = SentenceTransformer(modules=[words, pooling], device=device)

    def embed(sequences):
        vectors = model.encode(sequences, batch_size=batch_size, convert_to_tensor=True)
        return vectors.float().cpu().numpy()

    return embed


def compare_embedding(folder, options, device):
    """Time every way in turn; a way that cannot run is left out and said so."""
    name = options.device
    ways = {"bioscan_xla, bfloat16": lambda: ours(folder, device)}
    for dtype, batch in ((torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 8)):
        ways[f"Hugging Face pipeline, {str(dtype)[6:]}, batch {batch}"] = (
            lambda dtype=dtype, batch=batch: hugging_face_pipeline(folder, name, dtype, batch)
        )
    for batch in (8, 32, 128):
        ways[f"sentence-transformers, bfloat16, batch {batch}"] = lambda batch=batch: (
            sentence_transformers(folder, name, batch)
        )
    sequences = mixed_sequences(options.sequences)
    made, memory = {}, None
    for way, make in ways.items():
        try:
            made[way] = make()
            made[way](sequences)  # not counted
        except (ImportError, torch.OutOfMemoryError) as error:
            print(f"left out: {way} ({error})")
            made.pop(way, None)
        if memory is None:  # before another model is loaded
            memory = memory_bytes(device)
    best, vectors = {}, {}
    for _ in range(options.rounds):
        for way, embed in made.items():
            start = time.perf_counter()
            vectors[way] = embed(sequences)
            best[way] = min(best.get(way, np.inf), time.perf_counter() - start)
    report_embedding(best, vectors, made["bioscan_xla, bfloat16"].flops, peak_flops(device))
    config = esm_config(options.hidden, options.layers, options.heads)
    print(
        f"peak memory of bioscan_xla {memory / 2**30:.2f} GiB; its weights, by the plan, "
        f"{2 * count_parameters(config) / 2**30:.2f} GiB"
    )


def report_embedding(best, vectors, flops, peak):
    """Print a line for each way, and the ratios that are the goals."""
    exact = next(way for way in best if way.startswith("Hugging Face pipeline, float32"))
    count = len(vectors[exact])
    print(f"{'':44}    seq/s  of peak  least cosine")
    for way, seconds in best.items():
        a, b = vectors[way], vectors[exact]
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        print(
            f"{way:44} {count / seconds:8.2f}  {flops / seconds / peak:6.1%}  {cosine.min():12.6f}"
        )
    own = best["bioscan_xla, bfloat16"]
    for rival in ("Hugging Face pipeline", "sentence-transformers"):
        times = [seconds for way, seconds in best.items() if way.startswith(rival)]
        if times:
            print(f"ratio to {rival} at its best {min(times) / own:.2f}")
    print(f"ratio to Hugging Face pipeline, float32, batch 1 {best[exact] / own:.2f}")


def compare_training(folder, options):
    """Time an epoch of both, in turn, after a first round that is not counted."""
    training.write_labelled(Path(folder, "labelled.parquet"), options.training_sequences)
    same = {"device": options.device, "dtype": "bfloat16", "batch_size": options.batch_size}
    own, theirs = [], []
    for number in range(options.rounds + 1):
        own.append(training.train_ours(folder, f"ours-{number}", **same))
        theirs.append(training.train_theirs(folder, **same))
    print(f"fine-tuning, {options.training_sequences} sequences, batch {options.batch_size}")
    for name, seconds in (("bioscan_xla", own), ("Hugging Face Trainer", theirs)):
        print(f"{name:44} {options.training_sequences / min(seconds[1:]):8.2f}")
    print(f"ratio to Hugging Face Trainer {min(theirs[1:]) / min(own[1:]):.2f}")


def parse(arguments):
    """The options; `--device cpu` with a small model only shows that the script works."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--training-sequences", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments=None):
    """Print everything; exit status 0, or 2 without a GPU."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing is measured")
        return 2
    logging.disable(logging.WARNING)
    device = open_device(options.device, "bfloat16")
    what = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU"
    print(f"{what}, torch {torch.__version__}, peak {peak_flops(device) / 1e12:.1f} TFLOP/s")
    print(f"{options.layers} layers of {options.hidden}, {options.sequences} sequences\n{GOALS}")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder, "model"), options)
        compare_embedding(str(Path(folder, "model")), options, device)
        compare_training(folder, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
