"""Server settings: address, token, offered domains, and limits on what clients may use."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from pangu_sigma.errors import UserError
from pangu_sigma.generation.domain_inference_settings import DomainInferenceSettings

TOKEN_VARIABLE = "PANGU_SIGMA_TOKEN"
MOST_SLOTS = 1024
PROMPT_TOKENS = 1 << 14


@dataclass(frozen=True)
class ServerLimits:
    """Limits on what one client, or all of them, may use.

    slots: texts that are decoded together. queue: texts that may wait for a slot. max_tokens: most tokens of one answer
    (None: as many as the model's window holds). prompt_tokens: most tokens of all prompts of one HTTP request, each
    counted n times (None: 16,384, or four windows if these are more). head_seconds: longest time a request's head may
    take to arrive; body_bytes: longest request body; body_seconds: longest time it may take to arrive; stall_seconds:
    longest time a client may take nothing of its answer. choices: most answers of one HTTP request (prompts × n).
    grace_seconds: how long running answers may go on after SIGTERM. Raises UserError for values out of range.
    """

    slots: int = 8
    queue: int = 64
    max_tokens: int | None = None
    prompt_tokens: int | None = None
    body_bytes: int = 1 << 20
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    choices: int = 64
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        least = {"slots": 1, "queue": 0, "max_tokens": 1, "prompt_tokens": 1, "body_bytes": 1024, "grace_seconds": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} is {value}: give at least {lowest}")
        if self.slots > MOST_SLOTS:
            raise UserError(f"slots is {self.slots}: give at most {MOST_SLOTS}")

    def most_prompt_tokens(self, window: int) -> int:
        """Most tokens of all prompts of one HTTP request, with a model of this window."""
        return max(PROMPT_TOKENS, 4 * window) if self.prompt_tokens is None else self.prompt_tokens


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server: `domains` that are offered (empty: all); `token` that clients must present (None: none).

    warm_up: compile all graphs at startup.
    inference: how the domain of a prompt to the model id `auto` is inferred. Raises UserError for values out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    domains: tuple[str, ...] = ()
    token: str | None = None
    limits: ServerLimits = ServerLimits()
    warm_up: bool = True
    inference: DomainInferenceSettings = DomainInferenceSettings()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}: give one of 1 to 65535, or 0 for a free one")
        if self.token is not None and not self.token.strip():
            raise UserError(f"the token is empty; give it, or {TOKEN_VARIABLE}, a value, or neither")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
