"""The server, by real clients on a loopback port."""

import base64
import json
import re
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'bioscan_xla[serve]'")
openai = pytest.importorskip("openai", reason="openai is not installed")

from bioscan_xla.classify import run_classification_pipeline  # noqa: E402
from bioscan_xla.embed import run_embedding_pipeline  # noqa: E402
from bioscan_xla.encode.encoder import Encoder, load_encoder  # noqa: E402
from bioscan_xla.encode.inference import embed_text  # noqa: E402
from bioscan_xla.encode.runtime import open_device  # noqa: E402
from bioscan_xla.errors import ConfigError, InputError, ModelError  # noqa: E402
from bioscan_xla.options import ServeConfig  # noqa: E402
from bioscan_xla.reads.cleaning import clean_sequences  # noqa: E402
from bioscan_xla.reads.lineages import RANKS  # noqa: E402
from bioscan_xla.reads.tokens import tokenize  # noqa: E402
from bioscan_xla.reference import main as main_of_reference  # noqa: E402
from bioscan_xla.sample import write_model  # noqa: E402
from bioscan_xla.search import search_sequences  # noqa: E402
from bioscan_xla.serving.guard import check_address  # noqa: E402

from .serving import running, until  # noqa: E402

SEQUENCE = "ACGTTGCATGCCATTGACCTAGGATCCAAGTCGATTACGCTAGCTAACGGTT"


@pytest.fixture(scope="module")
def encoder(model_folder):
    """The served model, as embed loads it."""
    return load_encoder(model_folder, device=open_device("cpu", "float32"))


@pytest.fixture(scope="module")
def usable(sequences):
    """Sequences that embed takes."""
    return [text for text in sequences if len(text) >= 20]


@pytest.fixture(scope="module")
def wanted(encoder, usable):
    """Their vectors as embed computes them."""
    return embed_text(encoder, usable)


@pytest.fixture(scope="module")
def reference(model_folder, training_sample, tmp_path_factory):
    """A database of 60 labelled sequences, by the served model."""
    db = tmp_path_factory.mktemp("served") / "db"
    options = {"model": model_folder, "device": "cpu", "dtype": "float32"}
    run_embedding_pipeline(training_sample, str(db), **options)
    return str(db)


@pytest.fixture(scope="module")
def server(model_folder, reference):
    limits = {"max_body_mb": 1, "max_sequences": 200, "max_k": 20}
    tokens = {"max_request_tokens": 30_000, "max_queue_tokens": 40_000}
    options = {"model": model_folder, "name": "tiny", "reference": reference}
    with running(**options, **limits, **tokens) as it:
        yield it


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_client_gets_embeds_vectors_in_order(client, usable, wanted, encoding):
    options = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model="tiny", input=usable, **options)
    assert [item.index for item in found.data] == list(range(len(usable)))
    vectors = [item.embedding for item in found.data]
    if encoding == "base64":
        vectors = [np.frombuffer(base64.b64decode(text), "<f4") for text in vectors]
    np.testing.assert_allclose(np.array(vectors), wanted, atol=2e-5)
    tokens = sum(map(len, tokenize(clean_sequences(usable)[0])))
    assert found.usage.prompt_tokens == found.usage.total_tokens == tokens


def test_a_single_sequence_is_cleaned_as_embed_does(client, encoder):
    found = client.embeddings.create(model="tiny", input=f"nn{SEQUENCE.lower()}--U")
    expected = embed_text(encoder, [f"nn{SEQUENCE.lower()}--U"])[0]
    np.testing.assert_allclose(found.data[0].embedding, expected, atol=1e-5)
    assert found.usage.prompt_tokens == len(tokenize([SEQUENCE + "T"]).values)


def test_vectors_do_not_depend_on_other_clients(server, usable, wanted):
    """Twelve clients at once, each with sequences of its own, one of which is no DNA."""

    def ask(number):
        order = np.random.default_rng(number).permutation(len(usable))[: 5 + number]
        texts = [usable[at] for at in order]
        if number == 7:
            texts[3] = "ACGTZACGTACGTACGTACGTACGT"
        answer = server.post("embeddings", input=texts, model="tiny")
        return order, answer

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    for number, (order, answer) in enumerate(answers):
        if number == 7:
            assert answer.status_code == 422
            error = answer.json()["error"]
            assert (error["param"], error["code"]) == ("input[3]", "not_a_nucleotide")
            assert error["sequences"][0]["index"] == 3
            assert "ACGTZ" not in answer.text
            continue
        vectors = [item["embedding"] for item in answer.json()["data"]]
        np.testing.assert_allclose(np.array(vectors), wanted[order], atol=2e-5)
    assert (server.service.queue.tokens, server.service.queue.places) == (0, 0)


def test_models_carry_their_fingerprint(client, server, encoder):
    (model,) = client.models.list().data
    assert re.fullmatch(r"tiny@[0-9a-f]{12}", model.id)
    assert model.fingerprint["weights_sha256"] == encoder.fingerprint["weights_sha256"]
    assert "model" not in model.fingerprint  # where it lies is nobody's business
    assert client.models.retrieve(model.id).id == client.models.retrieve("tiny").id == model.id
    by_id = client.embeddings.create(model=model.id, input=SEQUENCE)
    assert by_id.model == model.id
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.embeddings.create(model="other", input=SEQUENCE)


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"input": [SEQUENCE, "ACGT"]}, 422, "too_short", "input[1]"),
        ({"input": ["N" * 30]}, 422, "only_n", "input[0]"),
        ({"input": ""}, 422, "empty_sequence", "input[0]"),
        ({"input": []}, 422, "no_sequence", None),
        ({"input": [1, 2, 3]}, 422, "invalid_field", "input"),
        ({"input": SEQUENCE, "dimensions": 12}, 400, "dimensions_not_supported", "dimensions"),
        ({"input": SEQUENCE, "encoding": "float"}, 422, "invalid_field", "encoding"),
        ({"input": [SEQUENCE] * 201}, 413, "too_many_sequences", "input"),
        ({"input": ["ACGTAC" * 31_000]}, 413, "too_many_tokens", "input"),
        ({"input": ["ACGT" * 300_000]}, 413, "body_too_large", None),
        ({}, 422, "invalid_field", "input"),
    ],
)
def test_errors_have_openais_shape(server, body, status, code, param):
    answer = server.post("embeddings", **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["message"]
    assert error["type"]


def test_other_errors_have_it_too(server):
    as_json = {"content-type": "application/json"}
    for answer, status in (
        (server.client.get("/v1/nothing"), 404),
        (server.client.delete("/v1/embeddings"), 405),
        (server.client.post("/v1/embeddings", content=b"{", headers=as_json), 400),
        (server.client.post("/v1/embeddings", content=b'{"input": "ACGT"}'), 415),
        (server.client.get("/v1/models", headers={"host": "elsewhere.org"}), 403),
        (server.post("models", name="x", model="y"), 403),
        (server.client.post("/v1/embeddings", headers={"x-timeout-seconds": "soon"}), 400),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    # Sent in pieces, without saying how long it is.
    pieces = (b"[" * 100_000 for _ in range(20))
    assert server.client.post("/v1/embeddings", content=pieces).status_code == 413


def test_curl(server):
    words = ["curl", "-s", f"{server.url}/v1/embeddings", "-H", "Content-Type: application/json"]
    body = json.dumps({"input": SEQUENCE, "model": "tiny"})
    with suppress(FileNotFoundError):
        found = subprocess.run([*words, "-d", body], capture_output=True, check=True)
        assert len(json.loads(found.stdout)["data"][0]["embedding"]) == 64


def test_full_queue_and_deadline(server):
    """While nothing is computed: 429 for what does not fit, 504 for who will not wait."""
    queue = server.service.queue
    with ThreadPoolExecutor(1) as pool, server.busy_device():
        waiting = pool.submit(server.post, "embeddings", input=["ACGTAC" * 25_000])
        until(lambda: queue.places == 1)
        refused = server.post("embeddings", input=["ACGTAC" * 25_000])
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        late = server.client.post(
            "/v1/embeddings", json={"input": SEQUENCE}, headers={"x-timeout-seconds": "0.2"}
        )
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert queue.places == 1
    assert waiting.result().status_code == 200
    assert queue.tokens == 0


def test_a_client_that_leaves_frees_its_place(server):
    queue = server.service.queue
    body = json.dumps({"input": SEQUENCE}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    before = server.service.metrics.batches._value.get()
    with server.busy_device():
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until(lambda: queue.places == 1)
        until(lambda: queue.places == 0)
        assert queue.tokens == 0
    assert server.post("embeddings", input=SEQUENCE).status_code == 200
    assert server.service.metrics.batches._value.get() == before + 1  # only this one was computed


def test_a_batch_that_fails_harms_one_request_only(server, wanted, usable, monkeypatch):
    bad = "GGGGGG" * 9
    token = tokenize([bad]).values[1]
    encode = Encoder.encode

    def fail(self, batch):
        if ((batch.input_ids == token).sum(1) >= 9).any():
            raise RuntimeError("out of memory")
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "encode", fail)
    with ThreadPoolExecutor(3) as pool, server.busy_device():
        texts = [usable[:3], [bad], usable[3:6]]
        answers = [pool.submit(server.post, "embeddings", input=text) for text in texts]
        until(lambda: server.service.queue.places == 3)
    first, failed, last = (answer.result() for answer in answers)
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "device_error")
    for answer, expected in ((first, wanted[:3]), (last, wanted[3:6])):
        vectors = [item["embedding"] for item in answer.json()["data"]]
        np.testing.assert_allclose(np.array(vectors), expected, atol=2e-5)
    assert server.service.device.is_well


def test_search_equals_the_command(server, reference, model_folder, usable):
    texts, where = usable[:3], "depth > 500 AND phylum IN ('Cnidaria', 'Annelida')"
    answer = server.post("search", input=texts, k=4, where=where)
    found = [
        {"query": f"query_{item['index'] + 1}", **row}
        for item in answer.json()["data"]
        for row in item["rows"]
    ]
    expected = search_sequences(reference, texts, k=4, where=where, device="cpu")
    assert len(found) == 12
    for ours, theirs in zip(found, expected, strict=True):
        assert abs(ours.pop("distance") - theirs.pop("distance")) < 1e-5
        assert ours == theirs
    assert server.post("search", input=texts, k=21).json()["error"]["code"] == "k_too_large"
    assert server.post("search", input=texts, where="depth >").status_code == 400


def test_classify_equals_the_command(server, reference, model_folder, usable, tmp_path):
    (tmp_path / "q.fasta").write_text(f">a\n{usable[0]}\n>b\n{usable[1]}\n>c\n{'ACGTTGCA' * 30}\n")
    run_classification_pipeline(
        str(tmp_path / "q.fasta"),
        reference,
        str(tmp_path / "out"),
        device="cpu",
        dtype="float32",
    )
    import pyarrow.parquet as pq

    expected = pq.read_table(tmp_path / "out/classified.parquet").to_pylist()
    answer = server.post("classify", input=[usable[0], usable[1], "ACGTTGCA" * 30]).json()
    for ours, theirs in zip(answer["data"], expected, strict=True):
        assert ours["lineage"] == {rank: theirs[rank] for rank in RANKS}
        for rank in RANKS:
            assert ours["confidence"][rank] == pytest.approx(theirs[f"confidence_{rank}"], abs=1e-4)
        assert ours["strand"] == theirs["strand"]
        assert ours["novelty"]["statement"] == theirs["novelty_statement"]
        hits = [hit["reference_id"] for hit in ours["evidence"]["hits"]]
        assert hits == [hit["reference_id"] for hit in theirs["hits"]]
    short = server.post("classify", input=usable[0], evidence=False).json()
    assert "evidence" not in short["data"][0]


def test_pages_for_people_and_programs(server):
    assert server.client.get("/health/live").json() == {"status": "live"}
    assert server.client.get("/health").json() == {"status": "ready"}
    server.post("embeddings", input=SEQUENCE)
    text = server.client.get("/metrics").text
    assert re.search(r'bioscan_requests_total{endpoint="embeddings",status="200"} [1-9]', text)
    for name in ("queue_tokens", "tokens_total", "batch_fill_bucket", "request_seconds_bucket"):
        assert f"bioscan_{name}" in text
    page = server.client.get("/openapi.json").json()
    body = page["components"]["schemas"]["EmbeddingsRequest"]["examples"][0]
    body.pop("model")
    assert server.post("embeddings", **body).status_code == 200
    for path in ("/v1/embeddings", "/v1/classify", "/v1/search"):
        example = page["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        assert example["example"]["data"]


def test_keys(model_folder, monkeypatch):
    monkeypatch.setenv("BIOSCAN_API_KEY", "first, second")
    monkeypatch.setenv("BIOSCAN_ADMIN_KEY", "boss")
    with running(model=model_folder, host="127.0.0.1") as it:
        for key, status in (("first", 200), ("second", 200), ("boss", 200), ("thrd", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert it.client.get("/v1/models", headers=headers).status_code == status
        none = it.client.get("/v1/models")
        assert (none.status_code, none.headers["www-authenticate"]) == (401, "Bearer")
        assert it.client.get("/health/ready").status_code == 200
        body = {"name": "x", "model": model_folder}
        as_client = {"authorization": "Bearer first"}
        assert it.client.post("/v1/models", json=body, headers=as_client).status_code == 403


def test_no_key_no_listening_beyond_this_machine(monkeypatch):
    monkeypatch.delenv("BIOSCAN_API_KEY", raising=False)
    open_to_all = {"model": "bioscan-small", "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="BIOSCAN_API_KEY"):
        check_address(ServeConfig(**open_to_all))
    check_address(ServeConfig(**open_to_all, anonymous=True))
    monkeypatch.setenv("BIOSCAN_API_KEY", "k")
    check_address(ServeConfig(**open_to_all))


def test_new_version_under_load(model_folder, tmp_path, monkeypatch, encoder):
    """No request is lost while the model of a name changes; the old one stays by its id."""
    monkeypatch.setenv("BIOSCAN_ADMIN_KEY", "boss")
    write_model(tmp_path / "new", hidden=64, layers=1, heads=4, seed=5)
    other = load_encoder(str(tmp_path / "new"), device=encoder.device)
    expected = [embed_text(model, [SEQUENCE])[0] for model in (encoder, other)]
    answers, over = [], threading.Event()
    with running(model=model_folder, name="m", max_models=2) as it:

        def ask():
            with httpx.Client(base_url=it.url, timeout=30) as client:
                while not over.is_set():
                    body = {"input": SEQUENCE, "model": "m"}
                    answers.append(client.post("/v1/embeddings", json=body))

        (old,) = it.client.get("/v1/models").json()["data"]
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: len(answers) > 4)  # by the old one
        admin = {"authorization": "Bearer boss"}
        body = {"name": "m", "model": str(tmp_path / "new")}
        wrong = it.client.post("/v1/models", json=body | {"model": "/no/where"}, headers=admin)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "model_not_loaded")
        new = it.client.post("/v1/models", json=body, headers=admin).json()
        assert new["current"]
        seen = len(answers)
        until(lambda: len(answers) > seen + 20)
        over.set()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200}
        by_id = {old["id"]: expected[0], new["id"]: expected[1]}
        assert {answer.json()["model"] for answer in answers} == set(by_id)
        for answer in answers:
            content = answer.json()
            vector = content["data"][0]["embedding"]
            np.testing.assert_allclose(vector, by_id[content["model"]], atol=2e-5)
        again = it.post("embeddings", input=SEQUENCE, model=old["id"]).json()
        np.testing.assert_allclose(again["data"][0]["embedding"], expected[0], atol=2e-5)
        full = it.client.post("/v1/models", json=body | {"name": "y"}, headers=admin)
        assert "DELETE" in full.json()["error"]["message"]
        assert it.client.delete(f"/v1/models/{new['id']}", headers=admin).status_code == 409
        assert it.client.delete(f"/v1/models/{old['id']}", headers=admin).status_code == 200
        gone = it.post("embeddings", input=SEQUENCE, model=old["id"])
        assert gone.status_code == 404


def test_a_version_that_does_less_is_refused(reference, tmp_path, monkeypatch, model_folder):
    """The table is of another model: /v1/search would fail under the name."""
    monkeypatch.setenv("BIOSCAN_ADMIN_KEY", "boss")
    write_model(tmp_path / "new", hidden=64, layers=1, heads=4, seed=5)
    admin = {"authorization": "Bearer boss"}
    with running(reference=reference, name="m") as it:  # the model that made the table
        body = {"name": "m", "model": str(tmp_path / "new")}
        refused = it.client.post("/v1/models", json=body, headers=admin)
        assert (refused.status_code, refused.json()["error"]["param"]) == (409, "reference")
        assert it.post("search", input=SEQUENCE, model="m").status_code == 200
        beside = it.client.post("/v1/models", json=body | {"name": "n"}, headers=admin).json()
        assert (beside["search"], beside["classify"]) == (False, True)
        error = it.post("search", input=SEQUENCE, model="n").json()["error"]
        assert "made by another model" in error["message"]
        assert it.post("classify", input=SEQUENCE, model="n").status_code == 200


def test_a_name_is_dropped_with_its_current_version(model_folder, tmp_path, monkeypatch, caplog):
    """By its whole id, unless it is the default; so a full server gets room again."""
    monkeypatch.setenv("BIOSCAN_ADMIN_KEY", "boss")
    admin = {"authorization": "Bearer boss"}
    reads = tmp_path / "reads.fasta"
    reads.write_text(">a\nACGT\n")
    with running(model=model_folder, name="m", max_models=2) as it:
        body = {"name": "n", "model": model_folder}
        new = it.client.post("/v1/models", json=body, headers=admin).json()
        for name, wanted in (("m", 409), ("n", 409), (new["id"], 200), ("n", 404)):
            assert it.client.delete(f"/v1/models/{name}", headers=admin).status_code == wanted
        assert it.post("embeddings", input=SEQUENCE, model="n").status_code == 404
        none = body | {"reference": str(tmp_path / "none.db")}
        refused = it.client.post("/v1/models", json=none, headers=admin)
        assert "none.db: no such file" in refused.json()["error"]["message"]
        assert "n is not loaded: " in caplog.text


def test_models_that_cannot_be_loaded(tmp_path, training_sample):
    with pytest.raises(ModelError), running(model=str(tmp_path / "none")):
        pass
    with pytest.raises(ModelError, match="pass --model"), running(reference=training_sample):
        pass
    absent = str(tmp_path / "none.db")
    with pytest.raises(InputError, match="no such file"), running(reference=absent):
        pass
    with pytest.raises(ConfigError, match="no model"):
        ServeConfig()
    with pytest.raises(ConfigError, match="max_queue_tokens"):
        ServeConfig(model="m", max_request_tokens=10, max_queue_tokens=5)


def test_a_named_model_and_a_whitened_table(reference, training_sample, model_folder, tmp_path):
    """Queries are whitened as the rows are, as when the model is taken from the table."""
    assert main_of_reference(["whiten", reference]) == 0
    texts = pq.read_table(training_sample)["dna_sequence"].to_pylist()
    texts = [text for text in texts if text and re.fullmatch("[ACGT]{60,}", text)][:5]
    own = {"reference": reference, "reference_table": "whitened", "num_trials": 0}
    found = {}
    for name, more in {"own": {}, "named": {"model": model_folder, "name": "db"}}.items():
        with running(**own, **more, jobs_folder=str(tmp_path)) as it:
            named = it.post("classify", input=texts).json()["data"]
            rows = it.post("search", input=texts, k=2).json()["data"]
            vectors = it.post("embeddings", input=texts).json()["data"]
            found[name] = (named, rows, vectors)
    assert found["own"] == found["named"]
    nearest = [item["evidence"]["hits"][0]["vector_similarity"] for item in found["named"][0]]
    assert max(nearest) == pytest.approx(1.0, abs=1e-3)  # the sequences are among the references


def test_a_table_made_anew_is_not_compared_with_vectors_of_another_model(
    training_sample, model_folder, tmp_path
):
    db, more = str(tmp_path / "db"), tmp_path / "more.fasta"
    write_model(tmp_path / "other", hidden=64, layers=1, heads=4, seed=5)

    def embed(model, source=training_sample):
        run_embedding_pipeline(source, db, model=str(model), device="cpu", dtype="float32")

    embed(model_folder)
    with running(reference=db, num_trials=0, jobs_folder=str(tmp_path)) as it:
        first = it.post("search", input=SEQUENCE, k=3).json()["data"]
        shutil.rmtree(db)
        error = it.post("search", input=SEQUENCE, where="depth > 1").json()["error"]
        assert error["code"] == "table_error"  # the condition is not to blame
        embed(model_folder)
        assert it.post("search", input=SEQUENCE, k=3).json()["data"] == first
        shutil.rmtree(db)
        embed(tmp_path / "other")
        for number in range(3):  # more versions than the first had
            refused = it.post("search", input=SEQUENCE, k=3)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "table_replaced")
            more.write_text(f">new{number}\n{SEQUENCE}{'ACGT' * number}\n")
            embed(tmp_path / "other", str(more))


def test_int8_vectors_are_those_of_embed(model_folder, usable):
    wanted = embed_text(load_encoder(model_folder, device=open_device("cpu", "int8")), usable)
    with running(model=model_folder, dtype="int8") as it:
        data = it.post("embeddings", input=usable).json()["data"]
        assert it.post("embeddings", input="ACGT").status_code == 422
    np.testing.assert_allclose([item["embedding"] for item in data], wanted, atol=1e-6)
