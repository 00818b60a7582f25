"""Domains of a trained model: listed, added, removed, renamed, merged, resized, without touching any other's bytes."""
