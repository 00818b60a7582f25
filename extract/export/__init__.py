"""Exporting a model to the formats that other programs run: Hugging Face, MINDIR, ONNX."""
