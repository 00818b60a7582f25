"""Operators with their gradients: compiled CPU kernels, compositions, native operators of a device."""
