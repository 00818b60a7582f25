"""Continual learning: replay, distillation, EWC and L2 penalties near a teacher snapshot."""
