from __future__ import annotations

import msgspec
import pytest

from shoal.scheduler import errors
from shoal.scheduler.errors import ShoalError
from shoal.server.errors import NotFoundError, error_body, http_error

STATUS = {
    "ShoalError": (500, "server_error", "internal_error"),
    "InvalidRequestError": (400, "invalid_request_error", "invalid_value"),
    "ContextLengthError": (400, "invalid_request_error", "context_length_exceeded"),
    "QueueFullError": (429, "rate_limit_error", "queue_full"),
    "RateLimitError": (429, "rate_limit_error", "rate_limit_exceeded"),
    "RequestTimeoutError": (408, "timeout_error", "timeout"),
    "EngineError": (500, "server_error", "engine_error"),
    "CheckpointError": (500, "server_error", "internal_error"),
    "ConfigError": (500, "server_error", "internal_error"),
    "AuthenticationError": (401, "invalid_request_error", "invalid_api_key"),
    "ForbiddenError": (403, "invalid_request_error", "forbidden"),
    "NotFoundError": (404, "invalid_request_error", "not_found"),
    "ModelNotFoundError": (404, "invalid_request_error", "model_not_found"),
    "MethodNotAllowedError": (405, "invalid_request_error", "method_not_allowed"),
    "MalformedRequestError": (400, "invalid_request_error", "malformed_request"),
    "UrlTooLongError": (414, "invalid_request_error", "url_too_long"),
    "HeadTooLargeError": (431, "invalid_request_error", "head_too_large"),
    "SlowClientError": (408, "timeout_error", "slow_client"),
    "StreamExpiredError": (410, "invalid_request_error", "stream_expired"),
    "IdempotencyKeyReuseError": (422, "invalid_request_error", "idempotency_key_reuse"),
    "BodyTooLargeError": (413, "invalid_request_error", "body_too_large"),
    "EngineUnavailableError": (503, "server_error", "engine_unavailable"),
    "BatchesUnavailableError": (503, "server_error", "batches_unavailable"),
}


def tree(root: type[ShoalError]) -> list[type[ShoalError]]:
    """The errors of the house; other tests may have made some of their own."""
    ours = [root] + [error for child in root.__subclasses__() for error in tree(child)]
    return [error for error in ours if error.__module__ in ("shoal.scheduler.errors", "shoal.server.errors")]


def test_every_error_has_its_place_in_http() -> None:
    assert {error.__name__ for error in tree(ShoalError)} == STATUS.keys()
    for error in tree(ShoalError):
        http = http_error(error("message"))
        assert (http.status, http.type, http.code) == STATUS[error.__name__]
        assert (http.retry_after is not None) == (http.status in (429, 503) or http.code == "engine_error")


def test_an_error_that_the_table_does_not_know_is_like_its_parent() -> None:
    class Narrower(errors.QueueFullError):
        pass

    assert http_error(Narrower("full")) == http_error(errors.QueueFullError("full"))


def test_a_message_is_never_long() -> None:
    error = error_body(errors.InvalidRequestError("a" * 5000 + "z" * 5000, param="b" * 5000)).error
    assert len(error.message) == 300 and error.message.startswith("a" * 140) and error.message.endswith("z" * 140)
    assert error.param == "b" * 64


@pytest.mark.parametrize("param", [None, "max_tokens"])
def test_the_error_object(param: str | None) -> None:
    error = errors.ContextLengthError("too long", param=param)
    assert str(error) == error.message == "too long"
    assert msgspec.to_builtins(error_body(error)) == {
        "error": {
            "message": "too long",
            "type": "invalid_request_error",
            "param": param,
            "code": "context_length_exceeded",
        }
    }


def test_the_tree_is_drawn_as_it_is() -> None:
    drawing = errors.__doc__ or ""
    for error in tree(ShoalError):
        if error.__module__ == "shoal.scheduler.errors":
            assert error.__name__ in drawing
    assert issubclass(errors.ContextLengthError, errors.InvalidRequestError)
    assert NotFoundError.__bases__ == (ShoalError,)
