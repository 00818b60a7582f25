"""The backbone's layers as cells: embeddings, attention, feed-forward networks, norms, heads."""
