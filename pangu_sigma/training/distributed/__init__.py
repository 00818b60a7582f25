"""Training over several devices: SPMD and pipeline steps, gradient reduction, evaluation on a mesh."""
