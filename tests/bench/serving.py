"""The server against what else serves a model of Hugging Face, all on this machine's loopback.

`python tests/bench/serving.py [--model mini|small] [--seconds 6] [--rounds 3]`. Three servers are
started with the same weights, dtype and threads: ours, a FastAPI endpoint that calls Hugging Face
once a request, and LitServe (`pip install litserve`) with its batches of 16. 1, 8 and 64 clients
then send one sequence a request, each the next as soon as it has an answer. The servers take turns
within a round, and the others idle meanwhile; figures are over all rounds. Prints the median and
99th percentile of the latency in milliseconds, sequences a second, and the processor time that the
server spent on one sequence.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np

try:
    import litserve
except ModuleNotFoundError:
    litserve = None

SYSTEMS = ("bioscan_xla", "fastapi", "litserve")
MODELS = {"mini": {"hidden": 512, "layers": 12, "heads": 8}}
CLIENTS = (1, 8, 64)
BATCH, BATCH_SECONDS = 16, 0.005  # of LitServe


class HuggingFace:
    """The mean over the tokens of the last hidden state, as the model card has it."""

    def __init__(self, folder, dtype):
        import torch
        from transformers import EsmConfig, EsmModel

        from bioscan_xla.reads.tokens import load_tokenizer

        self.torch, self.lock = torch, threading.Lock()
        self.model = EsmModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), add_pooling_layer=False
        ).eval()
        self.tokenizer = load_tokenizer(folder)
        self.frames = getattr(EsmConfig.from_pretrained(folder), "frames", 1)

    def embed(self, texts):
        """Vectors, as lists of numbers."""
        read = [text[frame:] for text in texts for frame in range(self.frames)]
        with self.lock, self.torch.inference_mode():
            tokens = self.tokenizer(read, return_tensors="pt", padding=True)
            states = self.model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"][..., None].float()
            sums = (states * mask).sum(1).view(len(texts), self.frames, -1).sum(1)
            counts = mask.sum(1).view(len(texts), self.frames, 1).sum(1)
            return (sums / counts).tolist()


def serve_fastapi(folder, dtype, port):
    """One call of the model for each request."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    model, app = HuggingFace(folder, dtype), FastAPI()

    class Body(BaseModel):
        input: str

    @app.post("/v1/embeddings")
    def embeddings(body: Body):
        return {"data": [{"embedding": model.embed([body.input])[0]}]}

    uvicorn.run(app, port=port, log_level="warning")


class BatchedApi(litserve.LitAPI if litserve else object):
    """Batches of up to 16, padded."""

    folder = dtype = None

    def setup(self, device):
        self.model = HuggingFace(self.folder, self.dtype)

    def decode_request(self, request):
        return request["input"]

    def predict(self, texts):
        return self.model.embed(texts)

    def encode_response(self, output):
        return {"data": [{"embedding": output}]}


def serve_litserve(folder, dtype, port):
    api = BatchedApi(max_batch_size=BATCH, batch_timeout=BATCH_SECONDS, api_path="/v1/embeddings")
    api.folder, api.dtype = folder, dtype
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=120)
    server.run(port=port, log_level="warning", generate_client_file=False, num_api_servers=1)


def start(system, folder, dtype):
    """A server's process and port, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [__file__, "--serve", system, "--folder", folder, "--dtype", dtype, "--port", str(port)]
    if system == "bioscan_xla":
        words = ["-m", "bioscan_xla.serve", "--model", folder, "--dtype", dtype]
        words += ["--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    body = json.dumps({"input": "ACGT" * 20}).encode()
    url, kind = f"http://127.0.0.1:{port}/v1/embeddings", {"Content-Type": "application/json"}
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"{system} ended: {process.stderr.read()[-2000:]}")
        try:
            request = urllib.request.Request(url, body, kind)
            with urllib.request.urlopen(request, timeout=10) as answer:
                vector = json.load(answer)["data"][0]["embedding"]
            return process, port, np.array(vector)
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{system} did not start")


def write_request(text):
    """The bytes of a request."""
    body = json.dumps({"input": text}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + body


async def one_client(port, requests, until, taken):
    """Send requests one after another; (start, seconds) of each into `taken`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for request in requests:
        begun = time.perf_counter()
        if begun >= until:
            break
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        assert head.startswith("http/1.1 200"), head
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        await reader.readexactly(length)
        taken.append((begun, time.perf_counter() - begun))
    writer.close()


def cpu_seconds(session):
    """Processor time of all processes of a server."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = path.read_text().rsplit(") ", 1)[1].split()
            if int(words[3]) == session:
                total += int(words[11]) + int(words[12])
    return total / os.sysconf("SC_CLK_TCK")


async def load(port, requests, clients, seconds):
    """Latencies in seconds and sequences a second of so many clients."""
    taken = []
    rng = np.random.default_rng(clients)
    started = time.perf_counter()
    orders = [[requests[at] for at in rng.permutation(len(requests))] for _ in range(clients)]
    tasks = (one_client(port, order * 1000, started + seconds, taken) for order in orders)
    await asyncio.gather(*tasks)
    return [spent for _, spent in taken], len(taken) / (time.perf_counter() - started)


def mixed_sequences(count, seed=0):
    """30 % 658 bp, 30 % 150-420, 30 % 900-1,800, 10 % up to one window of the model."""
    rng = np.random.default_rng(seed)
    spans = [(658, 659), (150, 421), (900, 1801), (1801, 5994)]
    chosen = rng.choice(4, count, p=(0.3, 0.3, 0.3, 0.1))
    return ["".join(rng.choice(list("ACGT"), rng.integers(*spans[at]))) for at in chosen]


def tell(systems, latencies, rates, spent):
    """Print what was measured so far."""
    heads = ("p50 ms", "p99 ms", "seq/s", "CPU ms")
    print(f"{'clients':>8} {'server':<12}" + "".join(f" {h:>8}" for h in heads), " of rounds")
    for clients in CLIENTS:
        for system in systems:
            if not latencies[system, clients]:
                continue
            p50, p99 = np.percentile(1000 * np.array(latencies[system, clients]), (50, 99))
            every = rates[system, clients]
            cost = 1000 * spent[system, clients] / len(latencies[system, clients])
            told = " ".join(f"{rate:.1f}" for rate in every)
            print(
                f"{clients:8} {system:<12} {p50:8.1f} {p99:8.1f} {np.mean(every):8.1f} "
                f"{cost:8.1f}  {told}",
                flush=True,
            )


def compare(folder, options):
    """Start all servers, load them in turn, print the table."""
    requests = [write_request(text) for text in mixed_sequences(200)]
    systems = options.systems.split(",")
    latencies = {(s, c): [] for s in systems for c in CLIENTS}
    rates = {(s, c): [] for s in systems for c in CLIENTS}
    spent = {(s, c): 0.0 for s in systems for c in CLIENTS}
    running = {system: start(system, folder, options.dtype) for system in systems}
    try:
        vectors = [vector for _, _, vector in running.values()]
        for system, vector in zip(systems, vectors, strict=True):
            cosine = vector @ vectors[0] / np.linalg.norm(vector) / np.linalg.norm(vectors[0])
            print(f"{system}: cosine with {systems[0]} {cosine:.5f}", flush=True)
        for _ in range(options.rounds):
            for clients in CLIENTS:
                for system in systems:
                    process, port, _ = running[system]
                    asyncio.run(load(port, requests, min(clients, 8), 0.5))  # warm
                    before = cpu_seconds(process.pid)
                    found, rate = asyncio.run(load(port, requests, clients, options.seconds))
                    spent[system, clients] += cpu_seconds(process.pid) - before
                    print(clients, system, len(found), "answers", file=sys.stderr, flush=True)
                    latencies[system, clients] += found
                    rates[system, clients].append(rate)
    finally:
        tell(systems, latencies, rates, spent)
        for process, _, _ in running.values():
            os.killpg(process.pid, signal.SIGTERM)  # LitServe's workers too
            process.wait(30)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", choices=(*MODELS, "small"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=SYSTEMS[1:], help="start one server")
    parser.add_argument("--folder")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.serve:
        serve = serve_fastapi if options.serve == "fastapi" else serve_litserve
        serve(options.folder, options.dtype, options.port)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.model == "small":
        from bioscan_xla.encode.model_files import locate

        compare(locate("bioscan-small"), options)
        return
    from bioscan_xla.sample import write_model

    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), **MODELS[options.model])
        compare(folder, options)


if __name__ == "__main__":
    main()
