"""Before a run's first step: where it starts from, and what it warns of."""
