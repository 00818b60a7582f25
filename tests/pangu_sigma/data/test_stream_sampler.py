"""A stream's batches depend on its documents' order alone: not on when bytes come, nor on where it resumed."""

import json
import os
import threading
import time

import numpy as np
import pytest

from pangu_sigma.config.data_section import StreamConfig
from pangu_sigma.data.growing_file import GrowingFileReader, StandardInputSpool, digests_before
from pangu_sigma.data.mixture_sampler import Batch
from pangu_sigma.data.stream_sampler import StreamEnded, StreamSampler
from pangu_sigma.errors import UserError

DOMAINS = ("code", "law")
LENGTH, SIZE = 32, 3


@pytest.fixture(scope="module")
def documents(code_texts) -> list[dict]:
    """Short and long documents of both domains, one without text, one much longer than a batch."""
    texts = [text[: 40 + 90 * (index % 5)] for index, text in enumerate(code_texts[:30])]
    texts[4], texts[7] = "", "\n".join(code_texts[30:45])
    return [{"text": text, "domain": DOMAINS[index % 3 == 0]} for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def content(documents) -> bytes:
    lines = [json.dumps(document, ensure_ascii=index % 2 == 0) for index, document in enumerate(documents)]
    return ("\n".join(lines[:9]) + "\n\n" + "\n".join(lines[9:]) + "\n").encode()


@pytest.fixture
def sampler(tokenizer, tmp_path):
    """Samplers of a file in the test's folder, which is closed in the end."""
    opened = []

    def make(ended=lambda: True, domains=DOMAINS, **config) -> StreamSampler:
        values = StreamConfig(path="unused", **config)
        opened.append(StreamSampler(tmp_path / "stream.jsonl", values, domains, tokenizer, LENGTH, 1, ended))
        return opened[-1]

    yield make
    for one in opened:
        one.stop()
        one.close()


def all_batches(sampler: StreamSampler) -> list[Batch]:
    batches = []
    try:
        while True:
            batches.append(sampler.next_batch(SIZE))
    except StreamEnded:
        return batches


def expected(documents, tokenizer) -> list[tuple[int, list[int]]]:
    """The sequences in the order in which they are complete, written out plainly."""
    strings, sequences = {name: [] for name in DOMAINS}, []
    for document in documents:
        if document["text"]:
            string = strings[document["domain"]]
            string += [*tokenizer.encode(document["text"]), tokenizer.eod_id]
            while len(string) > LENGTH:
                sequences.append((DOMAINS.index(document["domain"]), string[: LENGTH + 1]))
                del string[:LENGTH]
    return sequences


def assert_same(batches: list[Batch], expected_batches: list[Batch]) -> None:
    assert len(batches) == len(expected_batches)
    for batch, expected_batch in zip(batches, expected_batches, strict=True):
        assert batch.tokens.tobytes() == expected_batch.tokens.tobytes()
        assert batch.domain.tobytes() == expected_batch.domain.tobytes()
        assert batch.step == expected_batch.step and batch.sample.tolist() == expected_batch.sample.tolist()


def test_batches_are_the_documents_in_their_order(sampler, documents, content, tokenizer, tmp_path):
    (tmp_path / "stream.jsonl").write_bytes(content)
    batches, sequences = all_batches(sampler()), expected(documents, tokenizer)
    assert len(batches) == len(sequences) // SIZE > 10
    rows = [(int(d), row.tolist()) for batch in batches for d, row in zip(batch.domain, batch.tokens, strict=True)]
    assert rows == sequences[: len(rows)]
    assert [batch.step for batch in batches] == list(range(len(batches)))
    assert batches[1].sample.tolist() == [3, 4, 5] and batches[0].tokens.dtype == np.int32


def test_resuming_after_any_batch_goes_on_at_the_exact_byte(sampler, content, tmp_path):
    (tmp_path / "stream.jsonl").write_bytes(content)
    uninterrupted = all_batches(sampler())
    first = sampler()
    inside_a_document = 0
    for done in range(len(uninterrupted)):
        state = json.loads(json.dumps(first.state()))
        inside_a_document += state["given"] > 0
        again = sampler()
        again.restore(state)
        assert_same(all_batches(again), uninterrupted[done:])
        first.next_batch(SIZE)
    assert inside_a_document > 3


def test_when_bytes_arrive_makes_no_difference(sampler, content, tmp_path):
    path = tmp_path / "stream.jsonl"
    path.write_bytes(content)
    at_once = all_batches(sampler())
    path.write_bytes(b"")
    written = threading.Event()

    def write() -> None:
        draw = np.random.default_rng(0)
        offset = 0
        while offset < len(content):
            # Pieces end inside lines, and inside characters.
            size = int(draw.integers(1, 900))
            with open(path, "ab") as stream:
                stream.write(content[offset : offset + size])
            offset += size
            time.sleep(0.002)
        written.set()

    growing = sampler(ended=written.is_set)
    threading.Thread(target=write).start()
    assert_same(all_batches(growing), at_once)


def test_an_idle_stream_waits_until_it_is_stopped(sampler, content, tmp_path):
    (tmp_path / "stream.jsonl").write_bytes(content[:-1])  # the last line is not complete
    idle = sampler(ended=lambda: False)
    batches = []
    reader = threading.Thread(target=lambda: batches.extend(all_batches(idle)))
    reader.start()
    deadline = time.monotonic() + 20
    while idle.waiting_since is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert idle.waiting_since is not None and reader.is_alive()
    assert idle.position == content[:-1].rfind(b"\n") + 1
    idle.stop()
    reader.join(20)
    assert not reader.is_alive() and len(batches) > 10


@pytest.mark.parametrize(
    ("line", "config", "message"),
    [
        ("{", {}, "stream.jsonl:3: the line is not valid JSON"),
        ("[]", {}, "stream.jsonl:3: the line is no JSON object"),
        ('{"text": "a"}', {}, "the field 'domain' is missing, which names the document's domain"),
        ('{"text": "a", "domain": "poems"}', {}, "the domain 'poems' is not one of the run's (code, law)"),
        ('{"text": "a", "domain": ["law"]}', {}, "the domain ['law'] is not one of the run's"),
        ('{"domain": "law"}', {}, "the field 'text' is missing (fields: domain); set data.stream.text_field"),
        ('{"text": 5, "domain": "law"}', {}, "the field 'text' is no text but 5"),
        ('{"content": "a"}', {"domain": "law"}, "the field 'text' is missing (fields: content)"),
        ('{"text": "\\ud800", "domain": "law"}', {}, "half a surrogate pair"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(sampler, tmp_path, line, config, message):
    good = json.dumps({"text": "def f(): pass", "domain": "law"})
    (tmp_path / "stream.jsonl").write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        sampler(**config).next_batch(SIZE)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_named(sampler, tmp_path):
    (tmp_path / "stream.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="stream.jsonl:1: the line is not UTF-8"):
        sampler(domain="law").next_batch(SIZE)


def test_one_domain_for_all_and_other_fields(sampler, documents, content, tmp_path):
    lines = [json.dumps({"body": d["text"], "kind": d["domain"]}) for d in documents]
    (tmp_path / "stream.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    named = all_batches(sampler(text_field="body", domain_field="kind"))
    (tmp_path / "stream.jsonl").write_bytes(content)
    assert_same(named, all_batches(sampler()))
    assert {int(d) for batch in all_batches(sampler(domain="law")) for d in batch.domain} == {1}


def test_another_stream_is_refused(sampler, content, tmp_path):
    path = tmp_path / "stream.jsonl"
    path.write_bytes(content)
    first = sampler()
    for _ in range(6):
        first.next_batch(SIZE)
    state = first.state()
    path.write_bytes(content[: state["byte"] - 1])
    with pytest.raises(UserError, match=f"fewer than the {state['byte']} bytes that the run has learned from"):
        sampler().restore(state)
    path.write_bytes(content[:20] + b"#" + content[21:])
    with pytest.raises(UserError, match="does not hold before byte"):
        sampler().restore(state)
    path.write_bytes(content)
    with pytest.raises(UserError, match="was read with another seed"):
        sampler().restore({**state, "seed": 2})
    with pytest.raises(UserError, match="has learned from its domains' files, not from a stream"):
        sampler().restore({"version": 1, "domains": {}})


def test_a_stream_that_shrinks_while_it_is_read_is_refused(sampler, content, tmp_path):
    path = tmp_path / "stream.jsonl"
    path.write_bytes(content)
    reading = sampler(ended=lambda: False)
    reading.next_batch(SIZE)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="has shrunk to 100 bytes"):
        while True:
            reading.next_batch(SIZE)


def test_a_new_domain_joins_and_a_removed_one_is_forgotten(sampler, content, tmp_path):
    (tmp_path / "stream.jsonl").write_bytes(content)
    first = sampler()
    for _ in range(6):
        first.next_batch(SIZE)
    state = first.state()
    assert state["tails"].keys() <= set(DOMAINS)
    assert sum(entry["cursor"] for entry in state["domains"].values()) == 6 * SIZE
    more = sampler(domains=("code", "poems", "law"))
    more.restore(state)
    assert {int(d) for batch in all_batches(more) for d in batch.domain} == {0, 2}


# --- standard input


def received(spool: StandardInputSpool, size: int) -> bytes:
    deadline = time.monotonic() + 20
    while spool.path.stat().st_size < size and time.monotonic() < deadline:
        time.sleep(0.005)
    return spool.path.read_bytes()


def test_standard_input_is_kept_and_its_last_line_completed(tmp_path):
    out, into = os.pipe()
    spool = StandardInputSpool(tmp_path / "kept" / "received.jsonl", out)
    os.write(into, b'{"text": "a"}\n{"te')
    assert received(spool, 18) == b'{"text": "a"}\n{"te' and not spool.ended
    file = GrowingFileReader(spool.path)
    assert file.next_line().content == b'{"text": "a"}' and file.next_line() is None
    os.write(into, b'xt": "b"}')
    os.close(into)
    assert received(spool, 28) == b'{"text": "a"}\n{"text": "b"}\n'
    deadline = time.monotonic() + 20
    while not spool.ended and time.monotonic() < deadline:
        time.sleep(0.005)
    assert spool.ended and file.next_line().start == 14
    spool.close()
    file.close()
    os.close(out)


def test_a_line_whose_rest_never_arrived_is_cut_off(tmp_path):
    path = tmp_path / "received.jsonl"
    path.write_bytes(b"one\ntwo\nthr")
    out, into = os.pipe()
    spool = StandardInputSpool(path, out)
    assert spool.cut == 3
    os.write(into, b"three\n")
    assert received(spool, 14) == b"one\ntwo\nthree\n"
    spool.close()
    os.close(into)
    os.close(out)


def test_two_files_are_told_apart_before_a_byte(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"a" * 200_000)
    second.write_bytes(b"a" * 150_000 + b"b" * 50_000)
    assert digests_before(first, 150_000) == digests_before(second, 150_000)
    assert digests_before(first, 150_001) != digests_before(second, 150_001)
