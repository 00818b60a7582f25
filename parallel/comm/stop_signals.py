"""The signals that ask a command or a job of several processes to stop."""

from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2

STOP_SIGNALS = (SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2)
# Those that mean more the second time. The others come several times where nobody insists: a terminal that closes sends
# SIGHUP from its shell and from the system, a scheduler its warning and then SIGTERM.
INSISTENT = (SIGINT, SIGTERM)
