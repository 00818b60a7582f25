"""Base of the pydantic models of request bodies, and how their validation errors read."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, model_validator

from pangu_sigma.serving.api_errors import ApiError, bad_request

# Code of a field or value of OpenAI's API that this server does not have; also the type of such a pydantic error.
UNSUPPORTED = "unsupported_parameter"


class RequestModel(BaseModel):
    """A body or a part of it: no unknown field, no conversion of types, null means the default."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


def validation_error(error: RequestValidationError) -> ApiError:
    """The first validation error of a body, as OpenAI's clients expect it."""
    first = error.errors()[0]
    # Behind "body" stand the field's path and, in unions, names of the tried types.
    tried = ("list[", "function-")
    path = [str(part) for part in first["loc"][1:] if part != "str" and not str(part).startswith(tried)]
    param = ".".join(path)[:200] or None
    if first["type"] == "json_invalid":
        return bad_request(f"the body is no valid JSON: {first['ctx']['error']}")
    if param is None:
        return bad_request("the body must be a JSON object, sent with Content-Type: application/json")
    if first["type"] == "missing":
        return bad_request(f"{param} is required", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return bad_request(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    code = first["type"] if first["type"] == UNSUPPORTED else None
    return bad_request(f"{param}: {first['msg']}", param, code)
