"""Evaluation of a trained model: held-out loss per domain, few-shot tasks, and routing analysis."""
