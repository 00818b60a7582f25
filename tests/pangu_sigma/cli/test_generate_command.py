"""`pangu-sigma generate` as a user has it: where prompts come from, what goes where, and mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from pangu_sigma.generation import Request, Sampling, prompt_ids
from pangu_sigma.generation.completion import complete
from pangu_sigma.generation.engine import Engine
from pangu_sigma.trained_model import load_trained
from tests.pangu_sigma.training import training_process
from tests.pangu_sigma.training.training_process import assert_refused, command, fed

SHORT = ("--max-tokens", "5", "--seed", "3")


@pytest.fixture(scope="module")
def trained(finished_run):
    return load_trained(finished_run)


@pytest.fixture(scope="module")
def expected(trained):
    """(prompt, domain) -> the text that the command must print."""
    engine = Engine(trained.model, trained.tokenizer, 1)

    def text(prompt: str, domain: str, **settings) -> str:
        sampling = Sampling(**{"max_tokens": 5, "top_k": 40, "seed": 3, **settings})
        return prompt + complete(engine, [Request(prompt_ids(trained.tokenizer, prompt), domain, sampling)])[0].text

    return text


def test_the_text_alone_goes_to_standard_output(finished_run, tmp_path, expected):
    done = command("generate", finished_run, "--domain", "code", "--prompt", "def return", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected("def return", "code") + "\n"
    assert "5 tokens" in done.stderr and "tokens/s" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_prompt_comes_from_a_file_or_standard_input_without_its_last_line_end(finished_run, tmp_path, expected):
    (tmp_path / "prompt.txt").write_text("the court\n", encoding="utf-8")
    words = ("generate", finished_run, "--domain", "law", "--no-stream", *SHORT)
    text = expected("the court", "law") + "\n"
    assert command(*words, "--file", "prompt.txt", cwd=tmp_path).stdout == text
    assert command(*words, cwd=tmp_path, input="the court\n").stdout == text


def test_lines_of_json_are_continued_together_and_answered_in_order(finished_run, tmp_path, expected):
    prompts = [
        {"prompt": "rose moon"},
        {"prompt": "def", "domain": "code", "seed": 8},
        {"prompt": "naïve 中\n", "domain": "law"},
        {"prompt": ""},
    ]
    lines = "\n".join(json.dumps(prompt) for prompt in prompts) + "\n\n"
    words = ("generate", finished_run, "--domain", "poems", "--jsonl", "--slots", "2", "--logprobs", "2", *SHORT)
    done = command(*words, cwd=tmp_path, input=lines)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == [prompt["prompt"] for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        domain, seed = prompt.get("domain", "poems"), prompt.get("seed", 3)
        assert answer["domain"] == domain and answer["finish"] in ("stop", "length")
        assert prompt["prompt"] + answer["text"] == expected(prompt["prompt"], domain, seed=seed)
        assert len(answer["logprobs"]) == len(answer["ids"])
        assert all(len(token["top"]) == 2 and token["logprob"] <= 0 for token in answer["logprobs"])
        assert [token["id"] for token in answer["logprobs"]] == answer["ids"]
        told = b"".join(bytes(token["bytes"] or ()) for token in answer["logprobs"]).decode("utf-8", "replace")
        assert told.strip("\ufffd") == answer["text"].strip("\ufffd") or "\ufffd" in answer["text"]


@pytest.mark.parametrize(
    ("arguments", "given", "sentence"),
    [
        (["--prompt", "x", "--file", "y"], "", "--prompt cannot be given together with --file"),
        (["--file", "missing.txt"], "", "missing.txt cannot be read"),
        (["--jsonl"], '{"prompt": "a"}\nnonsense\n', "line 2 of standard input is not valid JSON"),
        (["--jsonl"], '{"text": "a"}\n', 'line 1 of standard input has no text under "prompt"'),
        (["--jsonl"], '{"prompt": "a", "tempo": 1}\n', 'unknown key "tempo"'),
        (["--jsonl"], "\n\n", "standard input holds no prompt"),
        (["--prompt", "x", "--temperature", "-1"], "", "temperature is -1.0"),
        (["--prompt", "x", "--top-p", "0"], "", "top_p is 0.0"),
        (["--prompt", "x", "--logprobs", "1"], "", "--logprobs needs --json or --jsonl"),
    ],
)
def test_a_mistake_is_told_before_the_model_is_loaded(finished_run, tmp_path, arguments, given, sentence):
    began = time.monotonic()
    done = command("generate", finished_run, "--domain", "law", *arguments, cwd=tmp_path, input=given)
    assert_refused(done, sentence)
    assert done.stdout == "" and time.monotonic() - began < 60


def test_domains_and_prompts_that_do_not_fit_the_model_are_told(finished_run, tmp_path):
    words = ("generate", finished_run, "--jsonl", "--domain", "law")
    assert_refused(command(*words, cwd=tmp_path, input='{"prompt": "a", "domain": "poem"}\n'), "did you mean 'poems'?")
    long = json.dumps({"prompt": "the court " * 40})
    done = command(*words, cwd=tmp_path, input=f'{{"prompt": "a"}}\n{long}\n')
    assert_refused(done, "prompt 2: the prompt has", "in one document, and the model's window has 16; shorten it")
    assert done.stdout == ""


def test_a_reader_that_leaves_ends_it_without_a_word(finished_run, tmp_path):
    lines = "".join(json.dumps({"prompt": f"the court {n}"}) + "\n" for n in range(200))
    running = fed("generate", finished_run, "--domain", "law", "--jsonl", *SHORT, text=lines, cwd=tmp_path)
    assert json.loads(running.stdout.readline())["prompt"] == "the court 0"
    running.stdout.close()
    stderr_text = running.stderr.read()
    assert running.wait(timeout=120) == 0 and "Traceback" not in stderr_text and "BrokenPipe" not in stderr_text


def test_ctrl_c_ends_it_cleanly(finished_run, tmp_path):
    lines = "".join(json.dumps({"prompt": f"the court {n}"}) + "\n" for n in range(5000))
    running = fed("generate", finished_run, "--domain", "law", "--jsonl", *SHORT, text=lines, cwd=tmp_path)
    first = running.stdout.readline()
    running.send_signal(signal.SIGINT)
    rest, stderr_text = running.stdout.read(), running.stderr.read()
    assert running.wait(timeout=120) == 130
    assert "Interrupted." in stderr_text and "Traceback" not in stderr_text
    assert all(json.loads(line) for line in (first + rest).splitlines())


def test_the_help_does_not_load_the_framework():
    program = (
        "import pangu_sigma.cli.generate_command, sys; print([m for m in ('mindspore', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=training_process.ROOT)
    assert done.stdout.strip() == "[]"
