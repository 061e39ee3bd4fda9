"""Errors of the HTTP API, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import EngineBusy, EngineDead, RequestFailed

RETRY_AFTER_SECONDS = 1


class ApiError(Exception):
    """An HTTP status with what OpenAI's error body says; `param` names the request's field at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(RETRY_AFTER_SECONDS)} if self.code == "engine_busy" else {}


def bad_value(error: ValueError, fields: Iterable[str]) -> ApiError:
    """A 400 for a ValueError; the argument that its sentence names first is the `param`."""
    words = str(error).replace(":", " ").replace(",", " ").split()
    return ApiError(400, str(error), param=next((word for word in words if word in set(fields)), None))


def engine_error(error: EngineBusy | EngineDead | RequestFailed) -> ApiError:
    """What the engine could not do: 503 when it takes no more, 500 when a step failed under the request."""
    if isinstance(error, EngineBusy):
        return ApiError(503, str(error), code="engine_busy")
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="engine_dead")
    return ApiError(500, str(error), code="request_failed")
