"""API errors in OpenAI's format: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping, Sequence

from starlette.responses import Response

from pangu_sigma.wording import did_you_mean

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Error response: HTTP `status`, a sentence, the request's field it concerns, and a code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict:
        """The JSON object that the client gets; also the payload of an error inside a stream."""
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP answer. Plain ASCII, since what it quotes may be no valid Unicode."""
        text = json.dumps(self.body(), ensure_ascii=True)
        return Response(text, self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client's mistake."""
    return ApiError(400, message, param, code)


def busy(retry_after: int) -> ApiError:
    """429: the queue is full; `retry_after` in seconds."""
    return ApiError(
        429,
        f"all slots and the queue are taken; try again in {retry_after} s",
        code="queue_full",
        headers={"Retry-After": str(retry_after)},
    )


def shutting_down() -> ApiError:
    """503: the server drains, it finishes what runs and admits nothing new."""
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})


def internal(error: BaseException, what: str) -> ApiError:
    """500: a fault of the program, with an id under which the server's log has the traceback; `what` failed."""
    error_id = secrets.token_hex(6)
    # On stderr, where the server says everything else.
    logging.getLogger(__name__).error("Error %s: %s failed", error_id, what, exc_info=error)
    # Clients try again after a 500 unless told otherwise, and the same request would most likely fail in the same way.
    return ApiError(
        500,
        f"the server met an internal error; its log says more under the id {error_id}",
        code="internal_error",
        headers={"x-should-retry": "false"},
    )


def failed(message: str) -> ApiError:
    """500: the model could not continue this request; others are not concerned."""
    # Clients try again after a 500 unless told otherwise, and the same request would fail in the same way.
    return ApiError(500, message, code="model_error", headers={"x-should-retry": "false"})


def unknown_model(model: str, offered: Sequence[str]) -> ApiError:
    """404: a model id that is no domain of the served model."""
    return ApiError(
        404,
        f"the model '{model[:80]}' does not exist; {did_you_mean(model, offered)} (GET /v1/models lists all)",
        param="model",
        code="model_not_found",
    )
