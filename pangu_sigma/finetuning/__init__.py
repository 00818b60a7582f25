"""Adaptation of a trained model: fine-tuning on prompts with answers, and on preferences between answers."""
