"""Tokenizers: SentencePiece, PanGu-α's, Hugging Face's, and training one."""
