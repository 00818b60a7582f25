"""Cutting domains out of a model: planning, copying, verifying, and the command."""
