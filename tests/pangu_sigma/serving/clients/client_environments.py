"""Foreign clients in environments of their own under build/clients/: their pins contradict each other's and ours."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[4]
PROGRAMS = Path(__file__).parent / "programs"
# Environment -> what is installed in it; the rest is whatever these ask for.
REQUIREMENTS = {
    "openai": ("openai==3.57.0",),  # the newest: what people have who install it today; pyproject.toml's is older
    "langchain": ("langchain-openai==1.7.4",),  # the newest; sends a conversation's history in forms of its own
    "lm-eval-0.4.13": ("lm-eval[api]==0.4.13",),  # the newest; asks the server for its tokenizer
    # The last before that, which many published tables name: it takes the tokenizer from a folder and sends a type with
    # every message. It needs PyTorch, of whose newer versions there are no small builds everywhere, and our exported
    # tokenizer needs sentencepiece.
    "lm-eval-0.4.9": ("lm-eval[api]==0.4.9", "torch==2.13.0", "transformers==4.57.1", "sentencepiece==0.2.3"),
}
SECONDS_TO_INSTALL = 1200


@functools.cache
def client_python(name: str) -> Path:
    """The Python of environment `name`, which is made once; skips the test where pip cannot bring what it needs."""
    folder = ROOT / "build" / "clients" / name
    python, stamp, requirements = folder / "bin" / "python", folder / "installed.txt", "\n".join(REQUIREMENTS[name])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == requirements:
        return python
    stamp.unlink(missing_ok=True)
    commands = [
        [sys.executable, "-m", "venv", "--clear", folder],
        [python, "-m", "pip", "install", "--quiet", "--no-compile", *REQUIREMENTS[name]],
    ]
    try:
        for words in commands:
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=SECONDS_TO_INSTALL)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip does not bring {name} within {SECONDS_TO_INSTALL} s")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot bring {name}: {(error.stderr.strip() or 'it says nothing').splitlines()[-1]}")
    stamp.write_text(requirements, encoding="utf-8")
    return python


def run_program(environment: str, program: str, *arguments: str) -> Any:
    """What a program of the folder `programs` prints, as JSON, run in an environment."""
    done = subprocess.run(
        [client_python(environment), PROGRAMS / program, *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OPENAI_API_KEY": "any"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)
