"""FastAPI application: OpenAI's paths, vLLM's tokenizer paths (for lm-evaluation-harness), health, metrics, page.

Handlers that are plain functions run in FastAPI's worker threads, those that are coroutines on the event loop.
"""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pangu_sigma.errors import UserError
from pangu_sigma.serving.api_errors import ApiError, bad_request
from pangu_sigma.serving.browser_page import load_page
from pangu_sigma.serving.openai_adapter import OpenAIAdapter
from pangu_sigma.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pangu_sigma.serving.request_guard import RequestGuard
from pangu_sigma.serving.request_model import validation_error
from pangu_sigma.serving.scheduler import Scheduler
from pangu_sigma.serving.server_metrics import ServerMetrics
from pangu_sigma.serving.server_settings import ServerSettings
from pangu_sigma.serving.streamed_response import OpenAIResponse
from pangu_sigma.version import VERSION


def create_app(
    scheduler: Scheduler, adapter: OpenAIAdapter, metrics: ServerMetrics, settings: ServerSettings, created: int
) -> FastAPI:
    """Build the application. `created`: when the model was written, in seconds since 1970."""
    # Without the documentation pages: they load scripts from elsewhere. The description itself is at /openapi.json.
    app = FastAPI(title="PanGu-Σ", version=VERSION, docs_url=None, redoc_url=None)
    _add_completions(app, scheduler, adapter, metrics)
    _add_models(app, adapter, created)
    _add_tokenizer(app, adapter)
    _add_service_paths(app, scheduler, metrics)
    _add_errors(app)
    paths = {route.path for route in app.routes}

    def count_response(path: str, status: int) -> None:
        label = "/v1/models" if path.startswith("/v1/models/") else path if path in paths else "other"
        metrics.requests.labels(label, str(status)).inc()

    app.add_middleware(RequestGuard, settings=settings, closing=scheduler.closing, on_response=count_response)
    return app


def _add_completions(app: FastAPI, scheduler: Scheduler, adapter: OpenAIAdapter, metrics: ServerMetrics) -> None:
    # Plain functions, for FastAPI's worker threads: tokenising a long prompt must not block the event loop.
    @app.post("/v1/completions")
    def completions(body: CompletionRequest) -> Response:
        """Continue one or more prompts with one domain's experts."""
        return OpenAIResponse(adapter.completion(body), scheduler, metrics)

    @app.post("/v1/chat/completions")
    def chat_completions(body: ChatRequest) -> Response:
        """Continue a conversation, which the model's own chat template or our plain one turns into a text."""
        return OpenAIResponse(adapter.chat(body), scheduler, metrics)


def _add_models(app: FastAPI, adapter: OpenAIAdapter, created: int) -> None:
    def described(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pangu-sigma",
            "max_model_len": adapter.window,  # vLLM's extension
        }

    @app.get("/v1/models")
    def models() -> dict:
        """Every domain is a model."""
        return {"object": "list", "data": [described(name) for name in adapter.domains]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict:
        """One domain."""
        return described(adapter.check_model(name))


def _add_tokenizer(app: FastAPI, adapter: OpenAIAdapter) -> None:
    tokenizer = adapter.tokenizer
    end = tokenizer.piece(tokenizer.eod_id)

    @app.get("/tokenizer_info")
    def tokenizer_info() -> dict:
        """The special tokens by name."""
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "eos_token": end,
            "bos_token": end,  # a document begins after the end of another
            "pad_token": tokenizer.piece(tokenizer.pad_id),
        }

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict:
        """Ids of a text; of the end-of-document token's name alone, that token: so clients ask for its id."""
        if body.model is not None:
            adapter.check_model(body.model)
        try:
            ids = [tokenizer.eod_id] if body.prompt == end else tokenizer.encode(body.prompt)
        except UserError as error:
            raise bad_request(str(error), "prompt") from None
        if body.add_special_tokens and body.prompt != end:
            ids = [tokenizer.eod_id, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": adapter.window}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict:
        """Text of ids."""
        if body.model is not None:
            adapter.check_model(body.model)
        try:
            return {"prompt": tokenizer.decode(body.tokens)}
        except ValueError as error:
            raise bad_request(str(error), "tokens") from None


def _add_service_paths(app: FastAPI, scheduler: Scheduler, metrics: ServerMetrics) -> None:
    page = load_page()

    @app.get("/health")
    def health() -> JSONResponse:
        """Whether requests are admitted, and how many run and wait."""
        state = "failed" if scheduler.failed.done() else "draining" if scheduler.draining else "ok"
        body = {
            "status": state,
            "active": scheduler.active,
            "waiting": scheduler.waiting,
            "slots": scheduler.limits.slots,
            "queue": scheduler.limits.queue,
        }
        return JSONResponse(body, status_code=200 if state == "ok" else 503)

    @app.get("/metrics")
    def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        body, kind = metrics.exposition()
        return Response(body, headers={"Content-Type": kind})

    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse(page.html, headers=page.headers)

    @app.get("/favicon.ico", include_in_schema=False)
    def no_icon() -> Response:
        return Response(status_code=204)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error).response()

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> Response:
        messages = {
            400: "the body cannot be read as JSON",
            404: f"there is nothing at {request.url.path[:80]}: this server has /v1/completions, "
            "/v1/chat/completions and /v1/models",
            405: f"{request.method[:10]} is not allowed at {request.url.path[:80]}",
        }
        message = messages.get(error.status_code, error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()
