"""The exception tree. Every error a user can cause is here, with its exit code and HTTP status.

A message says what was given, what is allowed and what to do, in that order.
"""

from __future__ import annotations


class SternaError(Exception):
    """Base of every error that Sterna raises on purpose.

    `exit_code` is what the CLI leaves with, `http_status` what the server answers,
    `code` the machine-readable name in an OpenAI error body, `param` the field at fault.
    """

    exit_code = 1
    http_status = 500
    error_type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(SternaError):
    """A setting is unknown, has a wrong type or a value that is not allowed."""

    exit_code = 2
    http_status = 400
    error_type = "invalid_request_error"
    code = "invalid_config"


class ModelError(SternaError):
    """A model cannot be found, read or is of a kind Sterna does not support."""

    exit_code = 3
    code = "model_error"


class ModelNotFoundError(ModelError):
    """No model by that name or path."""

    http_status = 404
    error_type = "invalid_request_error"
    code = "model_not_found"


class ModelFileError(ModelError):
    """A model file is missing, truncated or damaged; the message names the file."""

    exit_code = 4


class DraftCacheError(ModelFileError):
    """A file of past outputs that is damaged or belongs to another model; names the file."""


class UnsupportedModelError(ModelError):
    """The file is sound but its architecture, tensor type or option is not supported."""

    exit_code = 5


class KernelError(SternaError):
    """A forced kernel level is not available on this machine, or an op refuses its arguments."""

    exit_code = 6
    code = "kernel_error"


class PortInUseError(SternaError):
    """The server's address is taken."""

    exit_code = 7


class QuantizeError(ModelError):
    """A weight, a calibration set or an output folder that cannot be quantised as asked."""

    exit_code = 8
    code = "quantize_error"


class DataError(SternaError):
    """Training data that cannot be found, read or continued as asked; names the file."""

    exit_code = 9
    code = "data_error"


class RowError(DataError):
    """One row of a training file is malformed; the message begins with `file:line`."""


class TrainError(SternaError):
    """A training run that cannot go on; the message says where and what is kept."""

    exit_code = 10
    code = "train_error"


class NonFiniteError(TrainError):
    """The loss or a gradient is NaN or infinite."""

    code = "non_finite"


class RewardError(TrainError):
    """A reward raised, timed out or gave no finite number."""

    code = "reward_error"


class CheckpointError(TrainError):
    """A checkpoint that cannot be written, read or continued as asked."""

    code = "checkpoint_error"


class TransportError(TrainError):
    """Weights that did not arrive as they were sent."""

    code = "transport_error"


class WorkerError(TrainError):
    """A process of the run died, hangs or raised; the message names its rank and what it did."""

    code = "worker_error"


class RequestError(SternaError):
    """A request that cannot be served as asked; the client has to change it."""

    http_status = 400
    error_type = "invalid_request_error"
    code = "invalid_request"


class ContextLengthError(RequestError):
    """Prompt (plus asked completion) does not fit the model's context."""

    code = "context_length_exceeded"


class GrammarError(RequestError):
    """A JSON schema, regex, choice list or grammar does not compile."""

    code = "invalid_grammar"


class TaskError(RequestError):
    """The model is not of the kind that this request needs: one generates, another embeds."""

    code = "unsupported_task"


class UnknownModelError(RequestError):
    """The request names a model this server does not serve."""

    http_status = 404
    code = "model_not_found"


class AdapterError(RequestError):
    """An adapter that cannot be served or unloaded as asked: its shapes, rank, kind or name."""

    exit_code = 4
    code = "invalid_adapter"


class AuthError(SternaError):
    """Missing or wrong API key."""

    http_status = 401
    error_type = "authentication_error"
    code = "invalid_api_key"


class BodyTooLargeError(RequestError):
    """The HTTP body is larger than the server accepts."""

    http_status = 413
    code = "body_too_large"


class OverloadedError(SternaError):
    """The queue is full. `retry_after_s` predicts when a place will be free (seconds)."""

    http_status = 429
    error_type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class ShuttingDownError(SternaError):
    """The server drains and accepts no new request."""

    http_status = 503
    error_type = "server_error"
    code = "shutting_down"


class EngineDownError(SternaError):
    """The engine's thread has ended, or has work but finishes no step."""

    http_status = 503
    code = "engine_down"


class DeadlineError(SternaError):
    """The request's own deadline passed before it was finished."""

    http_status = 408
    error_type = "timeout_error"
    code = "deadline_exceeded"


class StepError(SternaError):
    """A forward step failed for this request (for example NaN logits); others were not harmed."""

    code = "step_failed"
