"""What a training refuses, at the command line: one sentence that names the cause, code 2, nothing damaged."""

import re
import resource
import shutil

import pytest

from pangu_sigma.checkpoint import find_latest
from pangu_sigma.config import load_config
from pangu_sigma.data.tokenizers.tokenizer_training import train_tokenizer
from pangu_sigma.errors import UserError
from pangu_sigma.training.job import train
from tests.pangu_sigma.training.training_process import assert_refused, checkpoint, command
from tests.text_domain import text_domain


def test_a_changed_corpus_is_refused_by_name(small_yaml, copied_run, corpora, tmp_path):
    run, file = copied_run(4), corpora / "law.jsonl"
    content = file.read_bytes()
    try:
        # Enough to change the tokenizer too, which is trained on the mix: the corpus is the cause to be named.
        with open(file, "a", encoding="utf-8") as stream:
            stream.writelines(f'{{"text": "whoever quarrels over boundary {n} pays"}}\n' for n in range(40))
        done = command("train", small_yaml, f"run.dir={run}", "--resume", cwd=tmp_path)
    finally:
        file.write_bytes(content)
    assert_refused(done, "the corpus of domain law has changed")


def test_a_changed_tokenizer_is_refused(small_yaml, copied_run, tmp_path):
    run = copied_run(4)
    text = tmp_path / "text.txt"
    text.write_text("quite other words, which stand in another text, are learned here as pieces\n" * 20)
    (tokenizer,) = run.glob("data/tokenizer-*")
    shutil.rmtree(tokenizer)
    train_tokenizer([text_domain("other", [str(text)], "text")], 330).save(tokenizer)
    done = command("train", small_yaml, f"run.dir={run}", "data.cache=null", "--resume", cwd=tmp_path)
    assert_refused(done, "the tokenizer is not the one", "restore it, or start a new run")


@pytest.mark.parametrize("file", ["shared.safetensors", "domains/law.safetensors", "state.json"])
def test_a_flipped_byte_is_refused_by_the_files_name(small_yaml, copied_run, tmp_path, file):
    run = copied_run(4)
    path = checkpoint(run, 4) / file
    assert path.exists(), sorted(checkpoint(run, 4).rglob("*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = command("train", small_yaml, f"run.dir={run}", "--resume", cwd=tmp_path)
    assert_refused(done, str(path))


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.model", "probe.safetensors", "config.yaml"])
def test_what_a_resumed_run_would_link_without_reading_it_is_refused_too(small_yaml, copied_run, file):
    run = copied_run(4)
    path = checkpoint(run, 4) / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged"):
        train(load_config(small_yaml, [f"run.dir={run}"]), resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["run.init_from={finished_run}", "model.hidden=32"], "model.hidden"),
        (["run.init_from=nowhere"], "nowhere does not exist"),
        (["data.cache=null", "data.sequence_length=100000", "model.positions=100000"], "fewer than one sequence"),
    ],
)
def test_a_refused_run_leaves_no_folder(small_yaml, finished_run, tmp_path, changes, sentence):
    own = [f"run.dir={tmp_path / 'runs/new'}", *(change.format(finished_run=finished_run) for change in changes)]
    with pytest.raises(UserError, match=sentence):
        train(load_config(small_yaml, own))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_refused_by_name(small_yaml, copied_run, tmp_path):
    run = copied_run(4)
    path = checkpoint(run, 4) / "domains/law.safetensors"
    path.unlink()
    done = command("train", small_yaml, f"run.dir={run}", "--resume", cwd=tmp_path)
    assert_refused(done, str(path), "missing")


def test_another_architecture_is_refused_with_both_values(small_yaml, copied_run, tmp_path):
    done = command("train", small_yaml, f"run.dir={copied_run(4)}", "model.hidden=32", "domains.law.experts=2",
                   "--resume", cwd=tmp_path)  # fmt: skip
    assert_refused(done, "model.hidden was 16 and is 32", "domains.law.experts was 1 and is 2")


def test_bfloat16_is_refused_on_a_cpu(small_yaml, tmp_path):
    done = command("train", small_yaml, "train.precision=bfloat16", cwd=tmp_path)
    assert_refused(done, "train.precision = bfloat16 does not run on run.device = CPU")


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole(small_yaml, copied_run, tmp_path):
    run = copied_run(4)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, 32 << 10))

    done = command("train", small_yaml, f"run.dir={run}", "evaluate.every=0", "--resume", cwd=tmp_path,
                   preexec_fn=limit)  # fmt: skip
    assert_refused(done, "step 6 was not saved", "the last checkpoint is whole")
    remaining, messages = find_latest(run)
    assert remaining.step == 4 and messages == []
    remaining.verify()


@pytest.mark.parametrize("folder", ["file/run", "file", "/proc/sys/run", "/proc/self"])
def test_a_folder_that_cannot_be_written_is_named(small_yaml, tmp_path, folder):
    (tmp_path / "file").write_text("")
    done = command("train", small_yaml, f"run.dir={tmp_path / folder}", cwd=tmp_path)
    assert_refused(done, f"run.dir {tmp_path / folder}", "choose another folder")
