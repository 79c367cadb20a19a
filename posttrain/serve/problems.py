"""Errors as problem details (RFC 9457), and below `/v1` in OpenAI's shape."""

import http
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from posttrain.errors import GateFailed, InputError, MachineError, PosttrainError, RunFolderError
from posttrain.run.redaction import redact, redact_json

STATUS: tuple[tuple[type[PosttrainError], int], ...] = (
    (RunFolderError, 409),
    (InputError, 422),
    (GateFailed, 409),
    (MachineError, 503),
)
"""Of what the rooms below raise; the first that fits counts."""


class ProblemDetails(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str


MEDIA_TYPE = "application/problem+json"
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {
        "description": said,
        "content": {MEDIA_TYPE: {"schema": ProblemDetails.model_json_schema()}},
    }
    for status, said in (("4XX", "Refused, with the reason."), ("5XX", "The server or its database failed."))
}
"""Of every endpoint, for the OpenAPI document."""


class Problem(PosttrainError):
    """What was asked for cannot be had, with the HTTP status that says so."""

    def __init__(self, status: int, detail: str, **more: Any) -> None:
        super().__init__(detail)
        self.status, self.more = status, more


OPENAI = "/v1"
"""Below it clients are OpenAI's."""
OPENAI_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


def openai_error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    code = code or OPENAI_CODES.get(status)
    return {"error": {"message": redact(message), "type": kind, "param": param, "code": code}}


def error_response(
    path: str, status: int, detail: str, headers: dict[str, str] | None = None, **more: Any
) -> JSONResponse:
    """What a request for `path` is refused with; `more` are members of the problem besides the usual."""
    if path == OPENAI or path.startswith(f"{OPENAI}/"):
        return JSONResponse(openai_error(status, detail), status, headers)
    body = {"type": "about:blank", "title": http.HTTPStatus(status).phrase, "status": status, "detail": redact(detail)}
    return JSONResponse(body | redact_json(more), status, headers, media_type=MEDIA_TYPE)


def add_handlers(app: FastAPI) -> None:
    @app.exception_handler(PosttrainError)
    def typed(request: Request, error: PosttrainError) -> JSONResponse:
        if isinstance(error, Problem):
            return error_response(request.url.path, error.status, str(error), **error.more)
        status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
        return error_response(request.url.path, status, str(error))

    @app.exception_handler(DBAPIError)
    def database(request: Request, error: DBAPIError) -> JSONResponse:
        logging.getLogger(__name__).error("%s %s: %s", request.method, request.url.path, redact(str(error.orig)))
        detail = "the database cannot be reached or does not answer; try again"
        return error_response(request.url.path, 503, detail, {"Retry-After": "5"})

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without the input itself: it may be long, and may hold what is no JSON.
        faults = [{"field": ".".join(map(str, fault["loc"])), "reason": fault["msg"]} for fault in error.errors()[:20]]
        first = f"{faults[0]['field']}: {faults[0]['reason']}" if faults else "the request is not valid"
        return error_response(request.url.path, 422, first, errors=faults)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> JSONResponse:
        path, detail = request.url.path, str(error.detail)
        if detail == http.HTTPStatus(error.status_code).phrase:
            detail = f"{request.method} {path}: {detail}"
        return error_response(path, error.status_code, detail, dict(error.headers or {}))

    @app.exception_handler(Exception)
    def unforeseen(request: Request, error: Exception) -> JSONResponse:
        logging.getLogger(__name__).error("%s %s", request.method, request.url.path, exc_info=error)
        detail = f"unforeseen error, a fault of ours: {type(error).__name__}: {error}"
        return error_response(request.url.path, 500, detail)
