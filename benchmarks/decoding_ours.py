"""The product's side of the decoding comparison: texts through the engine, asked for line by line.

    python -m benchmarks.decoding_ours CONFIG.yaml    # `decode BATCH PROMPT TOKENS ROUND`

All of `pangu-sigma generate` is in the figures: prompts, sampling, text, streaming events. Weights are untrained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from pangu_sigma import runtime
from pangu_sigma.config import config_from_dict


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding of the product, timed.")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    path = parser.parse_args().config
    config = config_from_dict(yaml.safe_load(path.read_text(encoding="utf-8")), source=str(path))
    runtime.prepare(config.run.device, Path(config.run.dir) / "mindspore")
    from pangu_sigma.data.corpus import prepare_corpus
    from pangu_sigma.generation import Request, Sampling
    from pangu_sigma.generation.completion import complete
    from pangu_sigma.generation.engine import Engine
    from pangu_sigma.model.build_model import build_model

    tokenizer = prepare_corpus(config).tokenizer
    model = build_model(config, config.model.vocab_size, tokenizer.eod_id)
    engine = Engine(model, tokenizer, slots=8)
    parameters = sum(p.size for p in model.net.trainable_params())
    parameters += sum(table.size for kind, _, _, table in model.store.tables() if kind == "weight")
    print(json.dumps({"ready": True, "parameters": parameters}), flush=True)
    names = model.groups.names
    for line in sys.stdin:
        _, *numbers = line.split()
        batch, prompt, tokens, turn = (int(number) for number in numbers)
        ids = np.random.default_rng(turn).integers(3, model.vocab, (batch, prompt))
        # Texts of all domains in turn, which is what one full model for all domains serves.
        requests = [
            Request(tuple(map(int, row)), names[n % len(names)], Sampling(tokens, temperature=1.0, seed=turn))
            for n, row in enumerate(ids)
        ]
        start = time.perf_counter()
        answers = complete(engine, requests)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": sum(len(a.events) for a in answers)}), flush=True)


if __name__ == "__main__":
    main()
