"""One generation request from its prompts to its response, whole or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import flask

from .admission import Admission
from .api_errors import ApiError, bad_value, engine_error
from .connection import ClientGone, Connection
from .errors import EngineBusy, EngineDead, RequestFailed
from .outputs import RequestOutput
from .protocol import SAMPLING_FIELDS
from .responses import ResponseBuilder

if TYPE_CHECKING:
    from .front import Front

Outputs = Iterator[tuple[int, RequestOutput]]


def answer(
    engine: Front,
    admission: Admission,
    builder: ResponseBuilder,
    prompts: Iterable[str | list[int]],
    streams_answer: bool,
) -> flask.Response:
    """Run the prompts; a whole answer, or one that is streamed. Counted in `admission` until it is sent."""
    admission.enter()
    try:
        connection = Connection(flask.request.environ)
        _submit(engine, connection, prompts, builder, "delta" if streams_answer else "final")
        outputs = connection.outputs()
        if streams_answer:
            events = _events(builder, outputs)
            first = next(events)  # what fails before the first token is an HTTP error with its own status
            response = flask.Response(_server_sent(first, events), content_type="text/event-stream; charset=utf-8")
            response.headers["Cache-Control"] = "no-cache"
            response.headers["X-Accel-Buffering"] = "no"
            response.call_on_close(outputs.close)
        else:
            response = flask.jsonify(_whole(builder, outputs))
    except BaseException:
        admission.leave()
        raise
    response.call_on_close(admission.leave)
    return response


def _submit(
    engine: Front,
    connection: Connection,
    prompts: Iterable[str | list[int]],
    builder: ResponseBuilder,
    kind: Literal["delta", "final"],
) -> None:
    try:
        for index, prompt in enumerate(prompts):
            request_id = f"{builder.id}-{index}"
            stream = engine.submit(
                prompt, builder.params, request_id=request_id, output_kind=kind, on_event=connection.notify
            )
            connection.streams.append(stream)
    except BaseException as error:
        connection.abort()
        if isinstance(error, ValueError):
            refused = bad_value(error, {*SAMPLING_FIELDS, "prompt", "prompt_token_ids"})
            refused.param = builder.name_of(refused.param)
            raise refused from None
        raise


def _whole(builder: ResponseBuilder, outputs: Outputs) -> dict[str, Any]:
    choices = [choice for i, output in outputs for choice in builder.choices(i, output, streaming=False)]
    if any(choice["finish_reason"] == "abort" for choice in choices):
        raise ApiError(503, "the request was aborted: the server is shutting down", code="aborted")
    return builder.response(sorted(choices, key=lambda choice: choice["index"]))


def _events(builder: ResponseBuilder, outputs: Outputs) -> Iterator[dict[str, Any]]:
    """The stream's payloads, one choice each as OpenAI sends them."""
    for i, output in outputs:
        for choice in builder.choices(i, output, streaming=True):
            yield builder.chunk([choice])
    if builder.include_usage:
        yield builder.usage_chunk()


def _server_sent(first: dict[str, Any], events: Iterator[dict[str, Any]]) -> Iterator[bytes]:
    """Server-sent events; an error after the first one is an event itself, then the stream ends as any other."""
    yield _event(first)
    try:
        for event in events:
            yield _event(event)
    except ClientGone:
        return
    except (EngineBusy, EngineDead, RequestFailed) as error:
        yield _event(engine_error(error).body)
    yield b"data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
