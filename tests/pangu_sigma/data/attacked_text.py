"""Text that is tokenised while the disk fails at one file operation after the other.

    python -m tests.pangu_sigma.data.attacked_text SCRATCH NUMBER EVERY

NUMBER: an error number, of writing into the cache, or negative of reading the corpora and the cache. One in EVERY
operations fails. Each time the preparation must end by one sentence, or succeed, and the next one gives what an
undisturbed one gives. Prints counts as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from pangu_sigma.config.load_config import config_from_dict
from pangu_sigma.data.corpus import prepare_corpus
from pangu_sigma.errors import UserError
from tests import file_faults

REFUSED, DONE = 3, 4


def main(scratch: Path, number: int, every: int) -> None:
    corpora, cache = scratch / "corpora", scratch / "cache"
    corpora.mkdir()
    for name, words in (("code", "def return if else"), ("law", "court shall party contract")):
        lines = [json.dumps({"text": f"{words} {words} {n}"}) + "\n" for n in range(60)]
        (corpora / f"{name}.jsonl").write_text("".join(lines))
    config = config_from_dict({
        "schema_version": 2, "run": {"dir": str(scratch / "run")}, "train": {"steps": 1},
        "model": {"preset": "tiny", "positions": 16},
        "data": {"sequence_length": 16, "cache": str(cache), "tokenizer": {"kind": "train", "vocab_size": 330}},
        "domains": [{"name": name, "data": [str(corpora / f"{name}.jsonl")]} for name in ("code", "law")],
    })  # fmt: skip

    def prints() -> list[str]:
        return [store.fingerprint for store in prepare_corpus(config).stores]

    file_faults.in_child(lambda: (scratch / "prints").write_text(json.dumps(prints())))
    expected = (scratch / "prints").read_text()
    counts = {"operations": 0, "refused": 0, "done": 0}
    operation = 0
    while True:
        shutil.rmtree(cache, ignore_errors=True)

        def work(operation: int = operation) -> None:
            file_faults.arm(scratch, operation, number)
            try:
                prints()
            except UserError as error:
                sentence = str(error)
                named = str(scratch) in sentence and os.strerror(abs(number)) in sentence and "\n" not in sentence
                os.write(2, b"" if named else sentence.encode())
                os._exit(REFUSED if named else 5)
            os._exit(DONE if file_faults.operations() <= operation else 0)

        ended = file_faults.in_child(work)
        if ended == DONE:
            break
        assert ended in (0, REFUSED), f"operation {operation}: {ended}"
        counts["operations"] += 1
        counts["refused" if ended else "done"] += 1
        file_faults.in_child(lambda: (scratch / "prints").write_text(json.dumps(prints())))
        assert (scratch / "prints").read_text() == expected
        assert not list(cache.glob(".tmp*"))
        operation += every
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
