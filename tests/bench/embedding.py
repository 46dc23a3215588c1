"""Embedding against what else is there, on the same model, sequences and threads.

`python tests/bench/embedding.py [--model wide] [--sequences 60]`; each way is timed in turn,
`--rounds` times over, and its best round counts. Prints sequences a second, the share of this
machine's measured bfloat16 matrix-multiply peak (real tokens only), the least cosine to Hugging
Face in float32, and the ratio to Hugging Face's pipeline. sentence-transformers, OpenVINO and
ONNX Runtime take part where they are installed.
"""

import argparse
import logging
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer, pipeline

from bioscan_xla.embed import run_embedding_pipeline
from bioscan_xla.encode.encoder import load_encoder
from bioscan_xla.encode.inference import prepare, run_jobs
from bioscan_xla.encode.packing import Totals
from bioscan_xla.encode.runtime import open_device, peak_flops
from bioscan_xla.sample import write_model
from bioscan_xla.table.neighbours import open_table

MODELS = {
    "mini": {"hidden": 512, "layers": 12, "heads": 8},
    "wide": {"hidden": 2560, "layers": 2, "heads": 20},  # two layers of the 2.5B geometry
}


def mixed_sequences(count, seed=0):
    """30 % 658 bp, 30 % 150-420, 30 % 900-1,800, 10 % up to one window of the model."""
    rng = np.random.default_rng(seed)
    spans = [(658, 659), (150, 421), (900, 1801), (1801, 5994)]
    chosen = rng.choice(4, count, p=(0.3, 0.3, 0.3, 0.1))
    return ["".join(rng.choice(list("ACGT"), rng.integers(*spans[at]))) for at in chosen]


def hugging_face_pipeline(folder, batch_size):
    """The feature-extraction pipeline in float32, mean over real tokens."""
    extract = pipeline("feature-extraction", model=folder, device="cpu", dtype=torch.float32)
    tokenizer = extract.tokenizer

    def embed(sequences):
        lengths = [len(tokenizer(sequence)["input_ids"]) for sequence in sequences]
        states = extract(sequences, batch_size=batch_size, return_tensors=True)
        pairs = zip(states, lengths, strict=True)
        return np.stack([state[0, :length].mean(0).numpy() for state, length in pairs])

    return embed


def sentence_transformers(folder, dtype, batch_size):
    """sentence-transformers' own encode(), which sorts by length."""
    from sentence_transformers import SentenceTransformer, models

    words = models.Transformer(folder, max_seq_length=1000, model_args={"dtype": dtype})
    model = SentenceTransformer(
        modules=[words, models.Pooling(words.get_word_embedding_dimension())], device="cpu"
    )
    return lambda sequences: model.encode(sequences, batch_size=batch_size).astype(np.float32)


def _traced(folder):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, ids):
            return self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids)
            ).last_hidden_state.mean(1)

    return Mean(), AutoTokenizer.from_pretrained(folder)


def openvino(folder):
    """OpenVINO, bfloat16, one sequence at a time."""
    import openvino as ov

    model, tokenizer = _traced(folder)
    example = torch.from_numpy(np.arange(4, 68)[None])
    compiled = ov.compile_model(
        ov.convert_model(model, example_input=example, input=[1, -1]),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()},
    )

    def embed(sequences):
        rows = (np.array([tokenizer(sequence)["input_ids"]]) for sequence in sequences)
        return np.concatenate([compiled(row)[0] for row in rows])

    return embed


def onnx_runtime(folder):
    """ONNX Runtime, dynamic int8, one sequence at a time."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    model, tokenizer = _traced(folder)
    example = torch.from_numpy(np.arange(4, 68)[None])
    plain, small = (str(Path(folder, name)) for name in ("model.onnx", "model-int8.onnx"))
    with torch.no_grad():
        torch.onnx.export(
            model,
            (example,),
            plain,
            input_names=["ids"],
            dynamic_axes={"ids": {1: "tokens"}},
            dynamo=False,
            opset_version=17,
        )
    quantize_dynamic(plain, small)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(small, options, providers=["CPUExecutionProvider"])

    def embed(sequences):
        rows = (np.array([tokenizer(sequence)["input_ids"]]) for sequence in sequences)
        return np.concatenate([session.run(None, {"ids": row})[0] for row in rows])

    return embed


def whole_command(folder, dtype):
    """The product from a Parquet file to the committed table, model loading left out."""

    def embed(sequences):
        with tempfile.TemporaryDirectory() as work:
            ids = [f"s{number}" for number in range(len(sequences))]
            table = pa.table({"sequence_id": ids, "dna_sequence": sequences})
            pq.write_table(table, Path(work, "in.parquet"))
            result = run_embedding_pipeline(
                str(Path(work, "in.parquet")),
                str(Path(work, "db")),
                model=folder,
                device="cpu",
                dtype=dtype,
                vector_dtype="float32",
            )
            vectors = open_table(str(Path(work, "db"))).to_arrow()["vector"].to_pylist()
        return np.array(vectors, np.float32), result["seconds"]

    return embed


def ways(folder):
    """Name and maker of every way, the one to compare with first."""
    yield "Hugging Face pipeline, float32, batch 1", lambda: hugging_face_pipeline(folder, 1)
    yield "Hugging Face pipeline, float32, batch 8", lambda: hugging_face_pipeline(folder, 8)
    for dtype, batch in ((torch.float32, 32), (torch.bfloat16, 8)):
        name = f"sentence-transformers, {str(dtype)[6:]}, batch {batch}"
        yield name, lambda d=dtype, b=batch: sentence_transformers(folder, d, b)
    yield "OpenVINO, bfloat16, batch 1", lambda: openvino(folder)
    yield "ONNX Runtime, int8, batch 1", lambda: onnx_runtime(folder)
    for dtype in ("float32", "bfloat16", "int8"):
        yield f"bioscan_xla, whole command, {dtype}", lambda d=dtype: whole_command(folder, d)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--sequences", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    sequences = mixed_sequences(options.sequences)
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, **MODELS[options.model])
        made = {}
        for name, make in ways(folder):
            try:
                made[name] = make()
            except ImportError as error:
                print(f"left out: {name} ({error})")
        best, vectors = {}, {}
        for _ in range(options.rounds):
            for name, embed in made.items():
                start = time.perf_counter()
                result = embed(sequences)
                seconds = time.perf_counter() - start
                if isinstance(result, tuple):
                    result, seconds = result
                vectors[name] = result
                best[name] = min(best.get(name, seconds), seconds)
        flops, peak = _model_flops(folder, sequences), peak_flops(open_device("cpu", "bfloat16"))
    first = next(iter(best))
    print(
        f"{options.model}: {MODELS[options.model]}, {len(sequences)} sequences, "
        f"{torch.get_num_threads()} threads, {_processor()}, bfloat16 matrix multiply "
        f"{peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':42}  seq/s  of peak  least cosine  ratio")
    for name, seconds in best.items():
        a, b = vectors[name], vectors[first]
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        print(
            f"{name:42} {len(sequences) / seconds:6.2f}  {flops / seconds / peak:6.1%}  "
            f"{cosine.min():12.6f}  {best[first] / seconds:5.2f}"
        )


def _model_flops(folder, sequences):
    encoder = load_encoder(folder, device=open_device("cpu", "bfloat16"))
    totals = Totals()
    list(run_jobs(encoder, [prepare(0, None, sequences, 1000, 100)], totals))
    return encoder.flops(totals.useful_tokens, totals.squared_tokens)


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
