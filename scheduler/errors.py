"""The one tree of errors.

    ShoalError                      root; carries the message for the user and the field (`param`) it is about
    |-- InvalidRequestError         the request can never be served as it stands
    |   `-- ContextLengthError      prompt, or prompt + max_tokens, exceeds what fits
    |-- QueueFullError              too much waits already; try again later
    |-- EngineError                 the engine failed while it worked on the request
    |-- CheckpointError             a file of a checkpoint is missing, malformed or unsupported
    `-- ConfigError                 a setting is wrong, or does not fit this machine

The tree starts here because every room but the clients may see this module, and it needs nothing but the standard
library.  Nothing in it knows of HTTP: `server/errors.py` holds the one table from these types to status codes.
"""


class ShoalError(Exception):
    """Root of all errors that are meant for a user.

    Args:
        message: what is wrong, the limit, and what would be right.
        param: the name of the request field, setting or file that is at fault, if one is.
        retry_after: whole seconds after which the same may be taken, if that is known.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequestError(ShoalError):
    """The request can never be served as it stands."""


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and `max_tokens` together, exceeds what the model or the KV cache can hold."""


class QueueFullError(ShoalError):
    """As much waits as may: requests, tokens or seconds."""


class EngineError(ShoalError):
    """The engine failed while it worked on the request; the request itself may be fine."""


class CheckpointError(ShoalError):
    """A file of a checkpoint is missing, malformed or of an unsupported kind."""


class ConfigError(ShoalError):
    """A setting is wrong, contradicts another, or does not fit this machine."""
