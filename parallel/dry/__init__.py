"""MindSpore's semi-auto-parallel pass for any number of devices, on a machine that has none."""
