"""The HTTP interface: OpenAI's paths, vLLM's tokenizer paths (for lm-evaluation-harness), health, metrics, page."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pangu_sigma.errors import UserError
from pangu_sigma.serving.api_errors import ApiError, bad_request, internal
from pangu_sigma.serving.browser_page import load_page
from pangu_sigma.serving.openai_adapter import Desk
from pangu_sigma.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    explained,
)
from pangu_sigma.serving.request_guard import Guard
from pangu_sigma.serving.scheduler import Scheduler
from pangu_sigma.serving.server_metrics import Metrics
from pangu_sigma.serving.server_settings import Settings
from pangu_sigma.serving.streamed_response import Answer
from pangu_sigma.version import VERSION


def create_app(scheduler: Scheduler, desk: Desk, metrics: Metrics, settings: Settings, created: int) -> FastAPI:
    """The application. `created`: when the model was written, in seconds since 1970."""
    # Without the documentation pages: they load scripts from elsewhere. The description itself is at /openapi.json.
    app = FastAPI(title="PanGu-Σ", version=VERSION, docs_url=None, redoc_url=None)
    _add_completions(app, scheduler, desk, metrics)
    _add_models(app, desk, created)
    _add_tokenizer(app, desk)
    _add_surroundings(app, scheduler, metrics)
    _add_errors(app)
    paths = {route.path for route in app.routes}

    def count(path: str, status: int) -> None:
        known = "/v1/models" if path.startswith("/v1/models/") else path if path in paths else "other"
        metrics.requests.labels(known, str(status)).inc()

    app.add_middleware(Guard, settings=settings, count=count)
    return app


def _add_completions(app: FastAPI, scheduler: Scheduler, desk: Desk, metrics: Metrics) -> None:
    # Plain functions: FastAPI runs them in a thread, so that tokenising a long prompt holds nobody up.
    @app.post("/v1/completions")
    def completions(asked: CompletionRequest) -> Response:
        """Continue one or more prompts with one domain's experts."""
        return Answer(desk.completion(asked), scheduler, metrics)

    @app.post("/v1/chat/completions")
    def chat_completions(asked: ChatRequest) -> Response:
        """Continue a conversation, written down with a plain template."""
        return Answer(desk.chat(asked), scheduler, metrics)


def _add_models(app: FastAPI, desk: Desk, created: int) -> None:
    def described(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pangu-sigma",
            "max_model_len": desk.window,  # as vLLM tells it
        }

    @app.get("/v1/models")
    def models() -> dict:
        """Every domain is a model."""
        return {"object": "list", "data": [described(name) for name in desk.domains]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict:
        """One domain."""
        return described(desk.check_model(name))


def _add_tokenizer(app: FastAPI, desk: Desk) -> None:
    tokenizer = desk.tokenizer
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
    def tokenize(asked: TokenizeRequest) -> dict:
        """Ids of a text; of the end-of-document token's name alone, that token: so clients ask for its id."""
        if asked.model is not None:
            desk.check_model(asked.model)
        try:
            ids = [tokenizer.eod_id] if asked.prompt == end else tokenizer.encode(asked.prompt)
        except UserError as error:
            raise bad_request(str(error), "prompt") from None
        if asked.add_special_tokens and asked.prompt != end:
            ids = [tokenizer.eod_id, *ids]
        return {"tokens": ids, "count": len(ids), "max_model_len": desk.window}

    @app.post("/detokenize")
    def detokenize(asked: DetokenizeRequest) -> dict:
        """Text of ids."""
        if asked.model is not None:
            desk.check_model(asked.model)
        try:
            return {"prompt": tokenizer.decode(asked.tokens)}
        except ValueError as error:
            raise bad_request(str(error), "tokens") from None


def _add_surroundings(app: FastAPI, scheduler: Scheduler, metrics: Metrics) -> None:
    page = load_page()

    @app.get("/health")
    def health() -> JSONResponse:
        """Whether requests are taken, and how many run and wait."""
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
        """For Prometheus."""
        body, kind = metrics.page()
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
        return explained(error).response()

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> Response:
        said = {
            400: "the body cannot be read as JSON",
            404: f"there is nothing at {request.url.path[:80]}; the interface begins at /v1",
            405: f"{request.method[:10]} is not allowed at {request.url.path[:80]}",
        }
        return ApiError(error.status_code, said.get(error.status_code, error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return internal().response()
