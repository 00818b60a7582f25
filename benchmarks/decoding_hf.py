"""Hugging Face's GPT-2 under `generate`, as a yardstick for decoding; it shares no code with the product.

    python benchmarks/decoding_hf.py --layers 8 --hidden 512 …    # `decode BATCH PROMPT TOKENS ROUND` per line

In its best plain form: two threads, `sdpa` attention, inference mode, the default (dynamic) cache, no end token, so
that every text has its full length. Weights are untrained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding of Hugging Face's GPT-2, timed.")
    for name, default in {"layers": 8, "hidden": 512, "heads": 8, "ffn": 2048, "vocab": 8192, "positions": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=given.vocab, n_positions=given.positions, n_embd=given.hidden, n_layer=given.layers,
        n_head=given.heads, n_inner=given.ffn, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    print(json.dumps({"ready": True, "parameters": model.num_parameters()}), flush=True)
    for line in sys.stdin:
        _, *numbers = line.split()
        batch, prompt, tokens, turn = (int(number) for number in numbers)
        ids = torch.randint(3, given.vocab, (batch, prompt), generator=torch.Generator().manual_seed(turn))
        start = time.perf_counter()
        with torch.inference_mode():
            token_ids = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
            )
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": batch * (token_ids.shape[1] - prompt)}), flush=True)


if __name__ == "__main__":
    main()
