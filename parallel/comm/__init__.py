"""Communication between the processes of a job: launch, exchange, gathers, watchdog."""
