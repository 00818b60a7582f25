"""Whatever a file holds, its reader returns or says in one sentence what is wrong, in bounded time and memory."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu_sigma.checkpoint import CheckpointContents, Fingerprints, open_checkpoint, save_checkpoint
from pangu_sigma.checkpoint.manifest import sign
from pangu_sigma.checkpoint.safetensors_header import load_safetensors, open_safetensors
from pangu_sigma.checkpoint.trainer_state import check_resumable
from pangu_sigma.config import load_config
from pangu_sigma.config.yaml_text import parse_yaml, parse_yaml_11
from pangu_sigma.convert.ckpt_file import CkptFile
from pangu_sigma.convert.import_olmoe import OlmoeImportSettings, import_olmoe
from pangu_sigma.convert.pangu_alpha_source import NumpyFile
from pangu_sigma.convert.protobuf_wire import field
from pangu_sigma.convert.safetensors_folder import open_folder
from pangu_sigma.convert.strategy_file import read_strategy
from pangu_sigma.convert.tokenizer_pieces import stored_pieces
from pangu_sigma.data.corpus_files import iterate_documents
from pangu_sigma.data.tokenizers.tokenizer_registry import load_tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.evaluation.task_files import read_task
from pangu_sigma.finetuning.examples import read_lines
from pangu_sigma.generation.prompts import PromptSource
from pangu_sigma.integrations.mindformers.mindformers_settings import read_yaml
from pangu_sigma.json_reader import LARGE, SMALL, UnreadableText, parse_json
from pangu_sigma.monitor.metrics_log import read_metrics
from pangu_sigma.monitor.result_files import read_json
from pangu_sigma.new_configuration import _text_field
from pangu_sigma.report.run_data import load_run
from pangu_sigma.trained_model import stored_config, stored_tokenizer
from tests.pangu_sigma.convert.pangu_alpha_files import write_ckpt
from tests.pangu_sigma.damaged_inputs import damaged

ROOT = Path(__file__).parents[2]
SECONDS, MEGABYTES = 30, 600  # of one input on a busy machine, and of all together
# Files that may read JSON or YAML in another way, and why.
EXCEPTIONS = {
    "pangu_sigma/json_reader.py": "the reader of JSON",
    "pangu_sigma/config/yaml_text.py": "the reader of YAML",
    "pangu_sigma/config/overrides.py": "what was written the line before, of Python's values",
    "pangu_sigma/config/config_text.py": "the places of keys in text that was made the line before",
    "pangu_sigma/checkpoint/manifest.py": "pydantic's reader, behind the reader of JSON",
    "pangu_sigma/checkpoint/distributed.py": "what the other processes of this run say",
    "pangu_sigma/doctor/check_processes.py": "what processes that it started have written",
    "pangu_sigma/evaluation/evaluation_job.py": "what processes that it started have written",
    "pangu_sigma/plan/compile_plan.py": "what a process that it started has written",
}
FORBIDDEN = {
    ("json", "load"), ("json", "loads"), ("json", "JSONDecoder"), ("yaml", "load"), ("yaml", "safe_load"),
    ("yaml", "full_load"), ("yaml", "unsafe_load"), ("yaml", "load_all"), ("yaml", "safe_load_all"),
    ("yaml", "compose"), ("yaml", "parse"), ("yaml", "scan"), ("yaml", "SafeLoader"),
    ("safetensors.numpy", "load_file"),
    ("safetensors.numpy", "load"), ("safetensors", "safe_open"), ("safetensors", "deserialize"),
}  # fmt: skip


PYDANTICS = {"model_validate_json", "validate_json", "parse_raw"}


def readings(tree: ast.AST) -> Iterator[int]:
    """Lines that read JSON, YAML or safetensors by a library, under whatever name."""
    names = {name for _, name in FORBIDDEN} | PYDANTICS
    modules = {"json": "json", "yaml": "yaml", "safetensors": "safetensors"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any((node.module, alias.name) in FORBIDDEN for alias in node.names):
            yield node.lineno
        if isinstance(node, ast.Attribute) and node.attr in names:
            owner = ast.unparse(node.value)
            if (modules.get(owner, owner), node.attr) in FORBIDDEN or node.attr in PYDANTICS:
                yield node.lineno


def test_json_yaml_and_safetensors_are_read_by_their_readers_alone():
    wrong, unneeded = [], dict(EXCEPTIONS)
    for package in ("parallel", "rre", "pangu_sigma", "extract"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if "export/hf_files" in name:  # runs where none of these packages is
                continue
            if lines := list(readings(ast.parse(path.read_text(encoding="utf-8")))):
                wrong += [] if unneeded.pop(name, "") else [f"{name}:{line}" for line in lines]
    assert not wrong, "read it by pangu_sigma.json_reader, config.yaml_text or checkpoint.safetensors_header"
    assert not unneeded


class Readers:
    """Real files in a folder, and how the product reads each: name -> (file that is damaged, its reader)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.readers: dict[str, tuple[Path, Callable[[], object]]] = {}
        self._texts()
        self._tokenizers()
        self._tensors()
        self._foreign()
        self._checkpoint()

    def _add(self, name: str, content: bytes | None, read: Callable[[Path], object], path: str = "") -> None:
        file = self.folder / (path or name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            file.write_bytes(content)
        self.readers[name] = (file, lambda: read(file))

    def _texts(self) -> None:
        quickstart = (ROOT / "configs" / "quickstart.yaml").read_bytes()
        anchored = b"a: &a {x: [1, 2.5, null]}\nb: *a\nc: 2001-01-01\nd: 1_000\ne: {<<: *a, y: 0x1f}\n"
        self._add("quickstart.yaml", quickstart, load_config)
        self._add("parsed.yaml", anchored + quickstart, lambda file: parse_yaml(file.read_bytes()))
        self._add("parsed_11.yaml", anchored + quickstart, lambda file: parse_yaml_11(file.read_bytes()))
        self._add("mindformers.yaml", anchored, read_yaml)
        self._add("override", b"[{name: a, weight: 1.5}]", self._override)
        document = b'{"text": "def f(x):\\n", "stars": 3, "meta": {"a": [1, null, "\\u00e9\\ud83d\\ude00"]}}\n'
        self._add("corpus.jsonl", document * 3, self._documents)
        question = b'{"question": "a?", "choices": ["b", "c"], "gold": 1, "domain": "code"}\n'
        self._add("task.jsonl", question * 2, read_task)
        example = b'{"prompt": "a", "answer": "b", "more": {"x": [1e3]}}\n'
        self._add("examples.jsonl", example * 2, lambda file: list(read_lines([file], ("prompt", "answer"))))
        prompt = b'{"prompt": "a", "domain": "code", "seed": 3}\n'
        self._add("prompts.jsonl", prompt * 2, lambda file: PromptSource(file=file, jsonl=True).read())
        self._add("result.json", b'{"of": {"a": [1, 2]}, "row": {"code": {"loss": 1.5}}}', read_json)
        train = {"kind": "train", "step": 1, "loss": 1.5, "losses": {"code": 1.5}, "tokens": {"code": 8}}
        train |= {"learning_rate": 0.1, "gradient_norm": "nan", "expert_load": {"blocks.1": {"code": [1, 2]}}}
        evaluation = {"kind": "evaluate", "step": 2, "losses": {"code": 1}, "unigram": {"code": 2}}
        records = b"".join(json.dumps(record).encode() + b"\n" for record in (train, evaluation, train))
        self._add("metrics", records, lambda file: read_metrics(file.parent), "metrics/metrics.jsonl")
        for name, content in (
            ("metrics.jsonl", records), ("config.yaml", quickstart), ("summary.json", b'{"seconds": 3.5, "steps": 2}'),
            ("evaluation.json", json.dumps({**evaluation, "matrix": {"code": {"code": 1.0}}}).encode()),
        ):  # fmt: skip
            self._add(f"run's {name}", content, lambda file: load_run(file.parent), f"run/{name}")

    @staticmethod
    def _override(file: Path) -> object:
        text = " ".join(file.read_bytes().decode("utf-8", "replace").split()) or "x"
        return load_config(ROOT / "configs" / "quickstart.yaml", [f"train.phases={text}"])

    @staticmethod
    def _documents(file: Path) -> object:
        _text_field(file)
        return list(iterate_documents("code", [file], stars_field="stars"))

    def _tokenizers(self) -> None:
        import sentencepiece
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        model = io.BytesIO()
        lines = (f"the quick brown fox {number} jumps over" for number in range(200))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=9,
            control_symbols=["<eod>"],
        )  # fmt: skip
        self.pieces = model.getvalue()
        vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
        self.library = Tokenizer(BPE(vocabulary, [("a", "b")])).to_str().encode()
        self._add("pieces.model", self.pieces, lambda file: stored_pieces(file.read_bytes()))
        from pangu_sigma.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        tokenizer = SentencePieceTokenizer(self.pieces)
        tokenizer.save(self.folder / "tokenizer")
        self.tokenizer = tokenizer
        for name in ("tokenizer.json", "tokenizer.model"):
            self._add(f"tokenizer's {name}", None, lambda file: load_tokenizer(file.parent), f"tokenizer/{name}")

    def _tensors(self) -> None:
        from safetensors.numpy import save

        tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int32)}
        self._add("small.safetensors", save(tensors, {"format": "np"}), load_safetensors)
        header = dict(tensors, c=np.zeros((), np.float64))
        self._add("header.safetensors", save(header), open_safetensors)
        first, second = save({"a": tensors["a"]}), save({"c": np.ones((2, 2), np.float16)})
        index = {"metadata": {"total_size": 32}, "weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}
        read = lambda file: [t.read(n) for n, t in open_folder(file.parent).tensors.items()]  # noqa: E731
        self._add("shard", first, read, "sharded/1.safetensors")
        self._add("other shard", second, read, "sharded/2.safetensors")
        self._add("index", json.dumps(index).encode(), read, "sharded/model.safetensors.index.json")

    def _foreign(self) -> None:
        from safetensors.numpy import save

        config = {
            "model_type": "olmoe", "vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
            "intermediate_size": 4, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
            "num_experts": 2, "num_experts_per_tok": 1, "eos_token_id": 0, "tie_word_embeddings": False,
            "norm_topk_prob": False, "initializer_range": 0.02,
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        }  # fmt: skip

        def read(file: Path) -> object:
            return import_olmoe(file.parent, file.parent.parent / "imported", OlmoeImportSettings())

        self._add("config.json", json.dumps(config).encode(), read, "olmoe/config.json")
        self._add("tokenizer.json", self.library, read, "olmoe/tokenizer.json")
        weights = {"model.norm.weight": np.ones(8, np.float32), "lm_head.weight": np.ones((8, 8), np.float32)}
        self._add("weights", save(weights), read, "olmoe/model.safetensors")
        write_ckpt(self.folder / "alpha.ckpt", {"a.b": np.ones((2, 3), np.float32), "c": np.ones((), np.float16)})
        self._add("alpha.ckpt", None, self._checkpoint_file)
        layouts = field(1, field(1, 2) + field(1, 4)) + field(2, field(1, 1) + field(1, (1 << 64) - 1))
        item = field(1, b"a.b") + field(2, layouts + field(6, 1) + field(7, 2))
        self._add("strategy.ckpt", field(3, item) + field(3, item.replace(b"a.b", b"c.d")), self._strategy)
        array = io.BytesIO()
        np.save(array, np.ones((3, 4), np.float32))
        self._add("table.npy", array.getvalue(), lambda file: NumpyFile(file, "a").fill("a", np.empty((3, 4))))

    @staticmethod
    def _checkpoint_file(file: Path) -> None:
        opened = CkptFile(file)
        for name, tensor in opened.tensors.items():
            opened.fill(name, np.empty(tensor.shape, np.float32))

    @staticmethod
    def _strategy(file: Path) -> None:
        for layout in read_strategy(file).values():
            layout.box(layout.device_count - 1, (1,) * len(layout.tensor_map))

    def _checkpoint(self) -> None:
        config = load_config(ROOT / "configs" / "quickstart.yaml")
        cursor = {"cursor": 3, "identity": {"corpus": "x"}}
        state = {
            "sampler": {"version": 1, "seed": 1, "step": 2, "sample": 8, "domains": {"code": cursor}},
            "shared_steps": 2, "loss_scale": {"value": 1.0, "clean": 2}, "kernels": "fused", "skipped": 0, "tokens": 64,
            "domain_changes": [{"step": 1, "change": "add law"}], "previous": {"phase": 1, "step": 1, "model": "x"},
            "reference": {"path": "/x", "sha256": "0"}, "config_before": "0", "origin": {"job": "import"},
        }  # fmt: skip
        contents = CheckpointContents(
            step=2, domains=["code"], coverage={}, config_text=config.to_yaml(), tokenizer_files=self.tokenizer.files(),
            probe={"code": np.arange(18, dtype=np.int32).reshape(2, 9)}, state=state,
            fingerprints=Fingerprints(tokenizer=self.tokenizer.fingerprint, corpora={"code": "x"}),
        )  # fmt: skip
        tensors = {"embedding.word": np.ones((50, 8), np.float32), "blocks.0.norm1.gamma": np.ones(8, np.float32)}
        folder = save_checkpoint(self.folder / "checkpoint", contents, tensors, keep=1).path
        self.manifest = (folder / "manifest.json").read_bytes()
        for name in json.loads(self.manifest)["files"]:
            self._add(f"checkpoint's {name}", None, self._signed, str((folder / name).relative_to(self.folder)))
        self._add("manifest.json", None, self._manifest, str((folder / "manifest.json").relative_to(self.folder)))

    def _signed(self, file: Path) -> None:
        """Reads the checkpoint whose damaged `file` somebody entered into the manifest as it is."""
        folder = next(parent for parent in file.parents if (parent / "manifest.json").exists())
        fields, content = json.loads(self.manifest), file.read_bytes()
        entry = fields["files"][str(file.relative_to(folder))]
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if "header_bytes" in entry:
            header = content[: 8 + int.from_bytes(content[:8], "little")]
            entry |= {"header_bytes": len(header), "header_sha256": hashlib.sha256(header).hexdigest()}
        (folder / "manifest.json").write_bytes(sign(json.dumps(fields, indent=1, ensure_ascii=False).encode() + b"\n"))
        try:
            self._read(folder)
        finally:
            (folder / "manifest.json").write_bytes(self.manifest)

    def _manifest(self, file: Path) -> None:
        content = file.read_bytes()
        file.write_bytes(sign(content) if content.startswith(self.manifest[:14]) else content)
        self._read(file.parent)

    @staticmethod
    def _read(folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        stored_config(checkpoint)
        check_resumable(checkpoint.state, folder / "state.json")
        stored_tokenizer(checkpoint).encode("the fox")
        checkpoint.load()
        checkpoint.probe()


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> Readers:
    return Readers(tmp_path_factory.mktemp("untrusted"))


def check_reader(readers: Readers, name: str, inputs: int, seed: int = 0) -> None:
    file, read = readers.readers[name]
    whole = file.read_bytes()
    draw = random.Random(f"{seed} {name}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for number in range(inputs):
            content = damaged(whole, draw)
            file.write_bytes(content)
            began = time.monotonic()
            try:
                read()
            except (UserError, UnreadableText) as error:
                assert "\n" not in str(error) and len(str(error)) < 20_000, (name, number)
                str(error).encode()
            except Exception as error:
                raise AssertionError(f"{name}, input {number}: {content[:2000]!r}") from error
            assert time.monotonic() - began < SECONDS, (name, number)
    finally:
        file.write_bytes(whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEGABYTES << 10, name


def test_the_files_are_read_while_they_are_whole(readers):
    failed = {}
    for name, (_, read) in readers.readers.items():
        try:
            read()
        except UserError as error:
            failed[name] = str(error)
    # The first lacks what only whole folders have; the others are not complete models.
    assert failed.keys() == {"mindformers.yaml", "override", "config.json", "tokenizer.json", "weights"} & failed.keys()


def test_readers_attacked_by_400_damaged_files_read_or_refuse_them_in_a_sentence(readers):
    count = len(readers.readers)
    for place, name in enumerate(readers.readers):
        check_reader(readers, name, 400 // count + (place < 400 % count))


@pytest.mark.slow
def test_readers_attacked_by_16000_damaged_files_read_or_refuse_them_in_a_sentence(readers):
    count = len(readers.readers)
    for place, name in enumerate(readers.readers):
        check_reader(readers, name, 16_000 // count + (place < 16_000 % count), seed=1)


def read_text(text: str) -> None:
    for parse in (parse_json, parse_yaml, parse_yaml_11):
        try:
            parse(text)
        except UnreadableText as error:
            assert "\n" not in str(error)
            str(error).encode()


TEXTS = st.text(alphabet="{}[]\":,\\ud8&*!-?#|>%@<=~\n\t 019.eE+axtn_'\x00é\ud800\ufeff", max_size=60)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_readers_attacked_by_100_generated_texts_read_or_refuse_them(text):
    read_text(text)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None)
@given(TEXTS)
def test_readers_attacked_by_4000_generated_texts_read_or_refuse_them(text):
    read_text(text)


LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(alphabet='aé"\\[{,😀\n', max_size=4)
VALUES = st.recursive(
    LEAVES | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(VALUES, st.booleans())
def test_json_that_python_writes_comes_back(value, ascii_only):
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only)) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is written twice"),
        ('{"a": NaN}', "NaN is none of its numbers"),
        ('{"a": -Infinity}', "-Infinity is none of its numbers"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": 18446744073709551616}', "beyond 64 bits"),
        ("9" * 5000, "beyond 64 bits"),
        ('["\\ud800"]', "half a surrogate pair"),
        ("[" * 100_000, "nested more than 64 levels deep"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested more than 64 levels deep"),
        ("[" + "0," * 1_000_000 + "0]", "larger than 1,000,000 values"),
        ('"' + '\\"' * 1_000_000, "not valid JSON"),
        (b"\n\xff", "line 2: not UTF-8 text"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8 text"),
        ('{"a":\n1,}', "line 2: not valid JSON"),
        (" " * (SMALL.bytes + 1), "larger than"),
    ],
)
def test_json_that_other_code_would_stumble_over_is_refused(text, problem):
    began = time.monotonic()
    with pytest.raises(UnreadableText) as error:
        parse_json(text)
    assert problem in str(error.value) and time.monotonic() - began < SECONDS


def test_what_json_may_hold_is_read():
    assert parse_json(b"\xef\xbb\xbf" + '{"é": "\\ud83d\\ude00 [[[["}'.encode()) == {"é": "😀 [[[["}
    assert parse_json('["' + "[{," * 1000 + '"]') == ["[{," * 1000]
    assert parse_json('{"a": NaN, "b": "\\ud800", "c": ' + "9" * 400 + "}", LARGE, lenient=True)["b"] == "\ud800"


DOUBLING = "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(60))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (DOUBLING, "line 15: larger than 100,000 values"),
        ("a: !!bool x\n", "line 1: not valid YAML ('x' is no bool"),
        ("a:\n  - !!timestamp x\n", "line 2: not valid YAML"),
        ("a: !!int ''\n", "not valid YAML"),
        ("a: !!float ''\n", "not valid YAML"),
        ("a: !!map [1]\n", "not valid YAML"),
        ("a: !!seq {b: 1}\n", "not valid YAML"),
        ("a: !!binary x\n", "not valid YAML"),
        ("a: !!python/name:os.system x\n", "not valid YAML"),
        ("a: *b\n", "not valid YAML"),
        ("a: &a {b: *a}\n", "stands inside what it names"),
        ('a: "\\ud800"\n', "half a surrogate pair"),
        ('a: "\\U00110000"\n', "not valid YAML"),
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("- " * 3000 + "a", "nested more than 64 levels deep"),
        ("a:\n  b: 1\n  b: 2\n", "line 3: the key 'b' is written twice"),
        (b"a: 1\nb: \xff\n", "line 2: not UTF-8 text"),
        ("#" * (5 << 20), "larger than"),
        ("a: 1\nb: \x07\n", "line 2: not valid YAML"),
    ],
    ids=range(19),
)  # fmt: skip
def test_yaml_that_expands_or_nests_without_end_or_does_not_fit_its_tag_is_refused(text, problem):
    for parse in (parse_yaml, parse_yaml_11):
        began = time.monotonic()
        with pytest.raises(UnreadableText) as error:
            parse(text)
        assert problem in str(error.value) and time.monotonic() - began < SECONDS


def test_numbers_of_yaml_11_in_base_60_do_not_take_the_square_of_their_length():
    with pytest.raises(UnreadableText, match="is no int that can be read"):
        parse_yaml_11("a: 1" + ":1" * 100_000)


def safetensors_bytes(header: object, data: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


@pytest.mark.parametrize(
    ("entries", "data", "problem"),
    [
        ({"a": ("F32", [1] * 40, [0, 4])}, 4, "no list of up to 8 sizes"),
        ({"a": ("F32", [1], [0, 4.0])}, 4, "not two byte counts"),
        ({"a": ("F32", [1], [0, 2**64])}, 4, "beyond 64 bits"),
        ({"a": ("F32", [2**40, 2**40], [0, 4])}, 4, "do not need"),
        ({"a": ("F32", [0, 2**63], [0, 0])}, 0, "too large"),
        ({"a": ("F32", [-1], [0, -4])}, 0, "no list of up to 8 sizes"),
        ({"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [2, 6])}, 6, "'b' begins at byte 2 where 4 bytes are taken"),
        ({"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [8, 12])}, 12, "'b' begins at byte 8 where 4 bytes are taken"),
        ({"a": ("F32", [1], [0, 4])}, 9, "its tensors take 4 bytes, and 9 follow the header"),
        ({"a": ("F32", [1], [0, 4])}, 3, "its tensors take 4 bytes, and 3 follow the header"),
        ({"a": ("F32", [3], [0, 8])}, 8, "has 8 bytes, which its shape and type do not need"),
        ({"a": ("F31", [1], [0, 4])}, 4, "is of an unknown type"),
        ({"a": ("F32", [True], [0, 4])}, 4, "no list of up to 8 sizes"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(tmp_path, entries, data, problem):
    keys = ("dtype", "shape", "data_offsets")
    header = {name: dict(zip(keys, entry, strict=True)) for name, entry in entries.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    with pytest.raises(UserError) as error:
        open_safetensors(path)
    assert str(path) in str(error.value) and problem in str(error.value)


def test_a_header_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    for content in (b"", b"\x01", (2**63).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no whole safetensors file"):
            open_safetensors(path)


def test_a_tokenizer_that_the_manifest_does_not_list_is_not_read(readers):
    file, _ = readers.readers["checkpoint's tokenizer/tokenizer.model"]
    folder = file.parents[1]
    fields = json.loads(readers.manifest)
    del fields["files"]["tokenizer/tokenizer.model"]
    try:
        (folder / "manifest.json").write_bytes(sign(json.dumps(fields, indent=1).encode() + b"\n"))
        with pytest.raises(UserError, match=r"tokenizer.model is no part of the checkpoint"):
            stored_tokenizer(open_checkpoint(folder))
    finally:
        (folder / "manifest.json").write_bytes(readers.manifest)
