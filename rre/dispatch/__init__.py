"""Dispatch and combine: token rows to their experts and back, dropless or by capacity."""
