"""Where the server listens and what it bounds."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from pangu_sigma.generation.inference_settings import Inference

TOKEN_VARIABLE = "PANGU_SIGMA_TOKEN"


@dataclass(frozen=True)
class Limits:
    """What one client, or all of them, may ask for.

    slots: texts that are decoded together. queue: texts that may wait for a slot. max_tokens: most tokens of one answer
    (None: as many as the model's window holds). head_seconds: longest time a request's head may take to arrive;
    body_bytes: longest request body; body_seconds: longest time it may take to arrive; stall_seconds: longest time a
    client may take nothing of its answer. choices: most answers of one HTTP request (prompts × n). grace_seconds: how
    long running answers may go on after SIGTERM.
    """

    slots: int = 8
    queue: int = 64
    max_tokens: int | None = None
    body_bytes: int = 1 << 20
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    choices: int = 64
    grace_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """A server: `domains` restricts which domains are offered (empty: all); `token` is what clients must present.

    warm_up: compile for every admitted length before the first client comes.
    inference: how the domain of a prompt to the model id `auto` is inferred.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    domains: tuple[str, ...] = ()
    token: str | None = None
    limits: Limits = Limits()
    warm_up: bool = True
    inference: Inference = Inference()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
