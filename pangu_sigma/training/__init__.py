"""Training. The path of one step is job -> loop -> trainer -> step -> optimizer."""
