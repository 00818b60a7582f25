"""Specs of the backbone's parts: a file for each kind of part, known before any framework is loaded."""
