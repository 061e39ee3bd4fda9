"""The OpenAI-compatible Flask application over the front of an engine."""

from __future__ import annotations

import hmac
import importlib.metadata
from typing import TYPE_CHECKING, Any

import flask
import werkzeug.exceptions
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from .admission import Admission
from .answer import answer
from .api_errors import ApiError, engine_error
from .bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from .connection import ClientGone
from .errors import EngineBusy, EngineDead, RequestFailed
from .protocol import parse
from .responses import ChatBuilder, CompletionBuilder

if TYPE_CHECKING:
    from .front import Front

MAX_BODY_BYTES = 8 * 2**20
MAX_CONCURRENT_REQUESTS = 512
OPEN_ROUTES = frozenset({"/health", "/ping", "/load", "/version", "/metrics"})
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody receives it


def create_app(
    engine: Front,
    *,
    api_key: str | None = None,
    max_concurrent_requests: int = MAX_CONCURRENT_REQUESTS,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> flask.Flask:
    """The application; `app.extensions["paddock"]` is its Admission.

    api_key: if given, asked for as a bearer token on all routes but health and metrics.
    """
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = max_body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]
    admission = app.extensions["paddock"] = Admission(max_concurrent_requests)
    _add_generation_routes(app, engine, admission)
    _add_text_routes(app, engine)
    _add_status_routes(app, engine, admission)
    _add_error_handlers(app)

    @app.before_request
    def check_api_key() -> None:
        if api_key is None or flask.request.path in OPEN_ROUTES:
            return
        sent = flask.request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    return app


def _add_generation_routes(app: flask.Flask, engine: Front, admission: Admission) -> None:
    @app.post("/v1/completions")
    def completions() -> flask.Response:
        body = parse(CompletionBody, _body())
        _check_model(engine, body.model)
        params = body.params(engine.default_params)
        prompts: list[str | list[int]] = body.prompt
        if body.add_special_tokens is False:
            prompts = [
                encode(engine, p, "prompt", add_special_tokens=False) if isinstance(p, str) else p for p in prompts
            ]
        return answer(engine, admission, CompletionBuilder(engine, params, body), prompts, bool(body.stream))

    @app.post("/v1/chat/completions")
    def chat_completions() -> flask.Response:
        body = parse(ChatBody, _body())
        _check_model(engine, body.model)
        params = body.params(engine.default_params)
        prompt = chat_prompt(engine, [m.as_dict for m in body.messages], body.add_generation_prompt is not False)
        return answer(engine, admission, ChatBuilder(engine, params, body), [prompt], bool(body.stream))


def _add_text_routes(app: flask.Flask, engine: Front) -> None:
    @app.post("/tokenize")
    def tokenize() -> dict[str, Any]:
        body = parse(TokenizeBody, _body())
        _check_model(engine, body.model)
        if body.messages is not None:
            messages = [message.as_dict for message in body.messages]
            tokens = chat_prompt(engine, messages, body.add_generation_prompt is not False)
        else:
            add_special = body.add_special_tokens is not False
            tokens = encode(engine, body.prompt or "", "prompt", add_special_tokens=add_special)
        pieces = [_tokenizer(engine).id_to_piece(token) for token in tokens] if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": engine.max_model_len,
            "tokens": tokens,
            "token_strs": pieces,
        }

    @app.post("/detokenize")
    def detokenize() -> dict[str, str]:
        body = parse(DetokenizeBody, _body())
        _check_model(engine, body.model)
        try:
            return {"prompt": _tokenizer(engine).decode(body.tokens, skip_special_tokens=False)}
        except ValueError as error:
            raise ApiError(400, f"tokens: {error}", param="tokens") from None


def _add_status_routes(app: flask.Flask, engine: Front, admission: Admission) -> None:
    def card() -> dict[str, Any]:
        return {
            "id": engine.model_name,
            "object": "model",
            "created": engine.created,
            "owned_by": "paddock",
            "max_model_len": engine.max_model_len,
            "vocab_size": engine.vocab_size,
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/<path:name>")
    def model(name: str) -> dict[str, Any]:
        # Of a path that begins with a slash, a folder's, URLs lose that.
        _check_model(engine, engine.model_name if name == engine.model_name.lstrip("/") else name)
        return card()

    @app.get("/health")
    @app.get("/ping")
    def health() -> dict[str, str]:
        problem = "the server is shutting down" if admission.draining else engine.health()
        if problem is not None:
            raise ApiError(503, problem, code="unhealthy")
        return {"status": "ok"}

    @app.get("/load")
    def load() -> dict[str, int]:
        now = engine.load()
        return {"server_load": sum(now.values()), **now}

    @app.get("/version")
    def version() -> dict[str, str]:
        return {"version": paddock_version()}

    @app.get("/metrics")
    def metrics() -> flask.Response:
        return flask.Response(engine.metrics.render(), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def _add_error_handlers(app: flask.Flask) -> None:
    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> flask.Response:
        return _error_response(error)

    @app.errorhandler(EngineBusy)
    @app.errorhandler(EngineDead)
    @app.errorhandler(RequestFailed)
    def engine_trouble(error: EngineBusy | EngineDead | RequestFailed) -> flask.Response:
        return _error_response(engine_error(error))

    @app.errorhandler(ClientGone)
    def client_gone(error: ClientGone) -> tuple[str, int]:
        return "", CLIENT_CLOSED_REQUEST

    @app.errorhandler(werkzeug.exceptions.HTTPException)
    def http_error(error: werkzeug.exceptions.HTTPException) -> flask.Response:
        request, status = flask.request, error.code or 500
        messages = {
            404: f"there is no route {request.path}",
            405: f"{request.path} does not take {request.method}",
            413: f"the body is larger than {app.config['MAX_CONTENT_LENGTH']} bytes",
        }
        response = _error_response(ApiError(status, messages.get(status, error.description or error.name)))
        response.headers.extend(h for h in error.get_headers() if h[0] == "Allow")
        return response

    @app.errorhandler(Exception)
    def bug(error: Exception) -> flask.Response:
        app.logger.exception("%s %s failed", flask.request.method, flask.request.path)
        return _error_response(ApiError(500, f"internal error: {type(error).__name__}"))


def _error_response(error: ApiError) -> flask.Response:
    response = flask.jsonify(error.body)
    response.status_code = error.status
    response.headers.extend(error.headers)
    return response


def _body() -> bytes:
    kind = flask.request.mimetype
    if kind and not kind.endswith("json"):
        # A web page may make a browser send forms and plain text to any server, JSON only to one that agrees.
        raise ApiError(415, f"the body must be application/json, not {kind}")
    return flask.request.get_data(cache=False)


def _check_model(engine: Front, name: str | None) -> None:
    if name is not None and name != engine.model_name:
        message = f"the model {name!r} does not exist; this server has {engine.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _tokenizer(engine: Front) -> Any:
    if engine.tokenizer is None:
        raise ApiError(400, "prompt: this server has no tokenizer, so prompts must be token ids", param="prompt")
    return engine.tokenizer


def chat_prompt(engine: Front, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation. Raises ApiError (400) if there is no template or it refuses the messages."""
    if engine.tokenizer is None or engine.chat_template is None:
        raise ApiError(400, "messages: this model has no chat template", param="messages")
    try:
        text = engine.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
    except ValueError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    return encode(engine, text, "messages")


def encode(engine: Front, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of `text`, which came in the request's field `param`. Raises ApiError (400)."""
    _tokenizer(engine)
    try:
        return engine.tokenize(text, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param) from None


def paddock_version() -> str:
    """The installed package's version; "unknown" when the code runs without being installed."""
    try:
        return importlib.metadata.version("paddock")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
