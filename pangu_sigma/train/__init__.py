"""The training job: step, optimizer, schedule, loop."""
