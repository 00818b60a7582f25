"""The README of an exported folder: what it holds, and a program that continues a text with it."""

from __future__ import annotations

from extract.export.export_source import ExportSource

_HEAD = """# PanGu-Σ as {format}: {domains}

{network}. Trained for {step:,} steps.
{files}

Every document begins after the end-of-document token; positions and attention restart after each. This program
continues a text greedily{needs}:

```python
{program}```
"""


def network_line(source: ExportSource, window: str = "") -> str:
    """The network's size in words, `window` among them."""
    model = source.config.model
    words = f"{model.layers} layers, {model.hidden} wide, vocabulary {source.vocab:,}{window}"
    if not model.sparse_prefixes:
        return words
    groups = ", ".join(f"{name} {size}" for name, size in zip(source.domains, source.experts, strict=True))
    return f"{words}, {len(model.sparse_prefixes)} sparse layers (experts: {groups})"


def guide(source: ExportSource, format_: str, files: str, program: str) -> str:
    """Markdown for the folder: the format's name, its files and its Python program between what all formats say."""
    jieba = source.tokenizer.kind == "pangu_alpha"
    return _HEAD.format(
        format=format_,
        domains=", ".join(source.domains),
        network=network_line(source, f", window {source.config.data.sequence_length:,} tokens"),
        step=source.checkpoint.step,
        files=files,
        needs=" (PanGu-α's tokenizer cuts words with jieba first, which this program leaves out)" if jieba else "",
        program=program,
    )
