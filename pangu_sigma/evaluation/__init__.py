"""Evaluation of a trained model: held-out loss per domain, task files, and how it routes."""
