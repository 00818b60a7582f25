"""Server settings: address, token, offered domains, and limits on what clients may use."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings

TOKEN_VARIABLE = "PANGU_SIGMA_TOKEN"


@dataclass(frozen=True)
class ServerLimits:
    """Limits on what one client, or all of them, may use.

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
class ServerSettings:
    """Settings of a server: `domains` that are offered (empty: all); `token` that clients must present (None: none).

    warm_up: compile all graphs at startup.
    inference: how the domain of a prompt to the model id `auto` is inferred.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    domains: tuple[str, ...] = ()
    token: str | None = None
    limits: ServerLimits = ServerLimits()
    warm_up: bool = True
    inference: DomainInferenceSettings = DomainInferenceSettings()

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
