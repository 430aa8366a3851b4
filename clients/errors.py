"""The one tree of errors that the client raises.

    ClientError                      root; `message` is one sentence for the user
    |-- UnsendableError              the request cannot be sent: a bad address or key, or a value JSON cannot carry
    |-- TransportError               no whole answer came
    |   |-- UnreachableError         no connection could be made, so the server never saw the request
    |   |-- TimedOutError            the server was silent for longer than `read_timeout`
    |   `-- BrokenConnectionError    the answer ended early; a stream that ends without its last event is one
    |-- ProtocolError                an answer came that is not in the protocol (a proxy's page, malformed JSON)
    |-- ParseError                   what the model wrote is not what was asked for, or is cut off
    `-- ApiError                     the server says what went wrong: `type`, `param`, `code`
        |-- StatusError              in place of an answer: `status`, `retry_after`
        `-- StreamError              in the middle of a stream

The errors do not carry what a stream delivered before it failed.
"""

from __future__ import annotations


class ClientError(Exception):
    """Root of all errors that the client raises."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UnsendableError(ClientError):
    """The request cannot be sent as it stands."""


class TransportError(ClientError):
    """No whole answer came."""


class UnreachableError(TransportError):
    """No connection could be made; the server never saw the request."""


class TimedOutError(TransportError):
    """The server was silent for longer than `read_timeout`."""


class BrokenConnectionError(TransportError):
    """The connection or the stream ended before the answer was whole."""


class ProtocolError(ClientError):
    """What came is not an answer in the protocol that was asked for."""


class ParseError(ClientError):
    """What the model wrote cannot be read as `response_format` or as arguments of a tool; its text is still there."""


class ApiError(ClientError):
    """The server answered with an error object.

    Attributes:
        type: OpenAI's class of the error, such as "invalid_request_error".
        param: the field of the request that is at fault, if one is.
        code: what programs tell errors apart by, such as "context_length_exceeded".
    """

    def __init__(
        self, message: str, *, type: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.type = type
        self.param = param
        self.code = code


class StatusError(ApiError):
    """The server answered with an error status in place of a result.

    Attributes:
        status: the HTTP status code.
        retry_after: seconds after which the server suggests to try again, if it does.
    """

    def __init__(self, message: str, *, status: int, retry_after: float | None = None, **fields: str | None) -> None:
        super().__init__(message, **fields)
        self.status = status
        self.retry_after = retry_after


class StreamError(ApiError):
    """The server reported an error after the stream had begun."""
