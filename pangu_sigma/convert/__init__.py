"""Model folders out of other models: PanGu-α's checkpoints, a dense model as a sparse one's start, more vocabulary."""
