"""Tasks: questions with choices or with answers, asked of a trained model."""
