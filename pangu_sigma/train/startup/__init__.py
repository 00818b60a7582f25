"""What happens before a run's first step: where it starts from, what it warns of."""
