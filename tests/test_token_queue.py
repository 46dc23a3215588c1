"""The queue in front of the device, and what clients may put into conditions and jobs."""

import itertools
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'bioscan_xla[serve]'")

from bioscan_xla.encode.inference import prepare
from bioscan_xla.encode.packing import Layout
from bioscan_xla.errors import InputError
from bioscan_xla.serving.conditions import check_condition
from bioscan_xla.serving.refusals import Refused
from bioscan_xla.serving.roots import Roots
from bioscan_xla.serving.token_queue import Ticket, TokenQueue

STATIC = Layout((128, 256), 2, 5)


def encoder(layout=None):
    return SimpleNamespace(layout=layout or Layout((1000,), 1, None), hidden=4)


def enter(queue, model, lengths, seconds=60.0):
    """A request of sequences with so many tokens each."""
    rng = np.random.default_rng(len(lengths))
    texts = ["".join(rng.choice(list("ACGT"), 6 * (length - 1))) for length in lengths]
    number = queue.next_number()
    job = prepare(number, None, texts, 1000, 100)
    place = queue.enter(sum(map(len, job.windows)), time.monotonic() + seconds)
    ticket = Ticket(model, number, job, place)
    queue.put(ticket)
    return ticket


def drain(queue):
    """Tokens of each ticket in each batch, by the number of the ticket."""
    batches = []
    while (work := queue.take(wait=False)) is not None:
        tokens = {}
        for window in work.windows:
            tokens[window.owner[0]] = tokens.get(window.owner[0], 0) + len(window)
        batches.append(tokens)
    return batches


def test_a_long_request_does_not_hold_up_a_short_one():
    queue, model = TokenQueue(10**6), encoder()
    long = enter(queue, model, [100] * 200)
    assert sum(queue.take(wait=False).tickets[long.number] is long for _ in range(3)) == 3
    short = enter(queue, model, [100] * 3)
    batches = drain(queue)
    assert batches[0][short.number] == 300  # all of it in the next batch
    assert all(short.number not in batch for batch in batches[1:])
    assert sum(batch.get(long.number, 0) for batch in batches) == 17_000


def test_requests_that_wait_get_equal_shares_of_tokens():
    queue, model = TokenQueue(10**6), encoder()
    many, few = enter(queue, model, [50] * 100), enter(queue, model, [250] * 20)
    for batch in drain(queue)[:9]:
        assert sum(batch.values()) >= 900
        assert abs(batch[many.number] - batch[few.number]) <= 250


def test_requests_of_one_sequence_are_served_as_they_came():
    queue, model = TokenQueue(10**6), encoder()
    tickets = [enter(queue, model, [100 + number]) for number in range(40)]
    served = [number for batch in drain(queue) for number in sorted(batch)]
    # A batch is filled with later ones that fit; nobody waits for a second batch.
    for at, ticket in enumerate(tickets):
        assert abs(served.index(ticket.number) - at) <= 10


def test_models_take_turns():
    queue = TokenQueue(10**6)
    one, other = encoder(), encoder()
    enter(queue, one, [500] * 8)
    enter(queue, other, [500] * 8)
    turns = [queue.take(wait=False).encoder for _ in range(8)]
    assert all(a is not b for a, b in itertools.pairwise(turns))


def test_a_static_batch_holds_no_more_windows_than_it_has_room_for():
    queue, model = TokenQueue(10**6), encoder(STATIC)
    enter(queue, model, [3] * 50)
    assert [sum(batch.values()) for batch in drain(queue)] == [30] * 5


def test_background_work_waits_but_not_for_ever():
    queue, model = TokenQueue(10**6), encoder()
    enter(queue, model, [1000] * 30)
    for _ in range(2):
        queue.put_batch(model, "a batch")
    kinds = ["B" if (queue.take(wait=False)).batch else "r" for _ in range(32)]
    assert "".join(kinds) == "r" * 8 + "B" + "r" * 8 + "B" + "r" * 14


def test_who_left_or_is_late_takes_nothing():
    queue, model = TokenQueue(1000), encoder()
    gone, late = enter(queue, model, [100] * 4), enter(queue, model, [100] * 4, seconds=-1)
    with pytest.raises(Refused) as refused:
        queue.enter(201, time.monotonic() + 1)
    assert refused.value.status == 429
    assert refused.value.retry_after_seconds >= 1
    queue.leave(gone.place)
    queue.leave(gone.place)  # a second time changes nothing
    assert queue.tokens == 400
    queue.enter(600, time.monotonic() + 1)
    assert drain(queue) == []
    assert gone.future.cancelled()
    assert late.future.exception().status == 504


def test_retry_after_follows_the_speed_of_the_device():
    queue = TokenQueue(1000)
    queue.enter(1000, 0)
    queue.tokens_per_second = 50.0
    with pytest.raises(Refused) as refused:
        queue.enter(500, 0)
    assert refused.value.headers == {"retry-after": "10"}


COLUMNS = ("depth", "phylum", "sequence_id", "vector", "dna_sequence", "water temp", "order")


@pytest.mark.parametrize(
    "where",
    [
        "depth > 1000 AND phylum = 'Cnidaria'",
        "(depth BETWEEN -5 AND 1e3 or depth is not null) and not phylum in ('a', 'b''c')",
        "`water temp` <= -1.5",
        "`order` like 'Ac%' AND sequence_id != 'x; DROP TABLE y --'",
    ],
)
def test_conditions_that_filter(where):
    check_condition(where, COLUMNS)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("depth > 1; DROP TABLE t", "';'"),
        ("depth > 1 -- rest", "'--'"),
        ("depth > 1 /* x */", r"'/\*'"),
        ("repeat('a', 1000000000) = 'b'", "'repeat' is no column"),
        ("phylum = upper('a')", "'upper' is no column"),
        ("depth(1) = 2", "'depth' before a parenthesis"),
        ("date('2020') = 1", "'date' before a parenthesis"),
        ("depth IN (SELECT depth FROM embeddings)", "'select' is no column"),
        ("dna_sequence LIKE 'ACGT%'", "'dna_sequence' is no column"),
        ("`vector` IS NULL", "'vector' is no column"),
        ("depth = 'a\\' OR 1=1", "not allowed"),
        ('"depth" > 1', "not allowed"),
        ("depth > 1 " * 80, "more than 200"),
        ("depth ~ 1", "'~'"),
        ("depth > 1 UNION depth", "'union' is no column"),
        ("CASE WHEN depth THEN 1 END", "'case' is no column"),
        ("depth::text = 'a'", "'::text'"),
        ("  ", "empty"),
    ],
)
def test_conditions_that_do_more_are_refused(where, reason):
    with pytest.raises(Refused, match=reason) as refused:
        check_condition(where, COLUMNS)
    assert refused.value.status == 400


@pytest.fixture
def roots(tmp_path):
    """Two allowed roots and a secret beside them, which a link leads to."""
    (tmp_path / "data/in").mkdir(parents=True)
    (tmp_path / "data/in/a.fasta").write_text(">a\nACGT\n")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/b.fasta").write_text(">b\nACGT\n")
    (tmp_path / "data2").mkdir()
    return Roots([str(tmp_path / "data"), "gs://bucket/reads"]), tmp_path


def test_inputs_and_outputs_below_the_roots(roots):
    allowed, folder = roots
    found = [str(folder / "data/in/a.fasta")]
    for name in ("data/in/a.fasta", "data", "data/*/*.fasta", "data/in/../in/a.fasta"):
        assert allowed.find_inputs(str(folder / name)) == found
    assert allowed.find_inputs(f"file://{folder}/data/in/a.fasta") == found
    assert allowed.find_output(f"{folder}/data/new.db") == f"{folder}/data/new.db"
    assert allowed.find_output("gs://bucket/reads/x.db") == "gs://bucket/reads/x.db"
    with pytest.raises(InputError):
        allowed.find_inputs(str(folder / "data/none.fasta"))


@pytest.mark.parametrize(
    "name",
    [
        "{}/secret/b.fasta",
        "{}/data/../secret/b.fasta",
        "{}/data/*/../../secret/b.fasta",
        "{}/data2",
        "{}/database.db",
        "data/in/a.fasta",
        "file:///etc/passwd",
        "file://localhost{}/data/in/a.fasta",
        "gs://bucket/reads/../other/x.fasta",
        "gs://bucket/readsmore/x.fasta",
        "gs://other/reads/x.fasta",
        "s3://bucket/reads/x.fasta",
        "simplecache::file:///etc/passwd",
        "http://169.254.169.254/x.fasta",
        "",
    ],
)
def test_places_elsewhere_are_refused(roots, name):
    allowed, folder = roots
    for find in (allowed.find_inputs, allowed.find_output):
        with pytest.raises(Refused) as refused:
            find(name.format(folder))
        assert (refused.value.status, refused.value.code) == (403, "not_allowed")


def test_links_that_lead_out_are_refused(roots):
    allowed, folder = roots
    os.symlink(folder / "secret/b.fasta", folder / "data/in/b.fasta")
    os.symlink(folder / "secret", folder / "data/out")
    for name in ("data/in/b.fasta", "data/in", "data/in/*.fasta", "data/out/b.fasta", "data/out"):
        with pytest.raises(Refused):
            allowed.find_inputs(str(folder / name))
    for name in ("data/out", "data/out/new.db", "data"):
        with pytest.raises(Refused):
            allowed.find_output(str(folder / name))
    with pytest.raises(Refused):
        Roots(["gs://bucket"]).find_output("gs://bucket/")
