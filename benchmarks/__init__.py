"""Where the numbers of docs/benchmarks.md come from: one command each."""
