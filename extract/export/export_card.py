"""The README of an exported folder: what it is and how to run it."""

from __future__ import annotations

from extract.export.export_source import ExportSource

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# PanGu-Σ: {domains}

{layers} layers, {hidden} wide, vocabulary {vocab:,}{sparse}. Trained for {step:,} steps; its tokenizer's
fingerprint is {fingerprint}….

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
inputs = tokenizer("…", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=64{domain_argument})
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

The tokenizer puts the end-of-document token first, because every document begins after one. Positions and attention
restart after each. At most {positions:,} tokens a document.
"""


def model_card(source: ExportSource) -> str:
    """Markdown for the folder of a Hugging Face export."""
    model = source.config.model
    sparse = ""
    if model.sparse_prefixes:
        groups = ", ".join(f"{name} {size}" for name, size in zip(source.domains, source.experts, strict=True))
        sparse = f", {len(model.sparse_prefixes)} sparse layers (experts: {groups})"
    several = len(source.domains) > 1
    return _CARD.format(
        domains=", ".join(source.domains),
        layers=model.layers,
        hidden=model.hidden,
        vocab=source.vocab,
        sparse=sparse,
        step=source.checkpoint.step,
        fingerprint=source.tokenizer.fingerprint[:12],
        domain_argument=f', domain="{source.domains[0]}"' if several else "",
        positions=model.positions,
    )
