"""What a store's error means: a final answer, or a fault that may pass. Whether an answer passes, its own client says.

The answers that botocore and gcsfs would repeat are taken from their lists, not from one of ours.
"""

from functools import cache
from types import SimpleNamespace
from typing import Any

_PASSING_STATUS = (408, 409, 425, 429)

_DAMAGED_UPLOADS = ("IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
"""S3 got fewer bytes than were sent, or others. Of these answers botocore repeats BadDigest alone."""

_UNNAMED = "400"
"""Code of what is wrong with a HEAD: its answer has no body that could say it, and so it may be any fault."""

_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", _UNNAMED)


def refusal(error: Exception) -> str | None:
    """Return the words for a store's final answer, or None for a fault that may pass."""
    if not isinstance(error, FileNotFoundError) and _client_repeats(error):
        return None
    # aiohttp's error carries its status itself; gcsfs names a 403 only in words.
    response = _s3_answer(error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):
        status = 403
    if response is not None:
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", status)
    elif status is None:  # huggingface_hub's errors carry the answer of httpx
        status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "message", None) or str(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"the store refuses access ({status or 'no status'}: {said}); check the credentials and the rights"
    if "Credential" in (kind := type(error).__name__) and "Retrieval" not in kind:  # their own server may be away
        return f"no credentials for the store ({said}); set them in the environment, such as AWS_ACCESS_KEY_ID"
    if isinstance(error, FileNotFoundError) or status == 404:
        return "the store has no such file"
    if status is not None and (400 <= status < 500 or status == 501) and status not in _PASSING_STATUS:
        return f"the store answers {status} ({said})"
    return None


def credentials_expired(error: Exception) -> bool:
    """Whether S3 refuses credentials that were good until now, or may do so."""
    response = _s3_answer(error)
    return response is not None and response.get("Error", {}).get("Code") in _EXPIRED


def renew_credentials(filesystem: Any) -> bool:
    """Make an s3fs filesystem read its credentials anew; return whether something outside this process may renew them.

    That is so for a role, a token file or a profile, and never for what the environment holds.
    """
    from fsspec.asyn import sync

    credentials = sync(filesystem.loop, filesystem.session.get_credentials)
    if credentials is None or credentials.method in ("env", "explicit"):
        return False
    filesystem.connect(refresh=True)
    return True


def _s3_answer(error: Exception) -> dict[str, Any] | None:
    """Return S3's answer as botocore parsed it; s3fs wraps botocore's error."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else None


def _client_repeats(error: Exception) -> bool:
    """Whether the store's own client library would ask again after this error."""
    if (response := _s3_answer(error)) is not None:
        return _botocore_repeats(response)
    if type(error).__module__.startswith("gcsfs."):
        from gcsfs.retry import is_retriable

        return bool(is_retriable(error))
    return False


def _botocore_repeats(response: dict[str, Any]) -> bool:
    """Whether botocore would repeat a request after this answer, in its standard or in its older, larger mode."""
    from botocore.retries.standard import RetryContext, ThrottledRetryableChecker, TransientRetryableChecker

    # S3 puts the name of a service behind it before that one's code.
    code = str(response.get("Error", {}).get("Code", "")).removeprefix("KMS.")
    if code in (*_DAMAGED_UPLOADS, _UNNAMED):
        return True
    answer = {**response, "Error": {**response.get("Error", {}), "Code": code}}
    context = RetryContext(attempt_number=1, parsed_response=answer)
    if TransientRetryableChecker().is_retryable(context) or ThrottledRetryableChecker().is_retryable(context):
        return True
    status = SimpleNamespace(status_code=response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return bool(_older_checker()(1, (status, answer), None, None))


@cache
def _older_checker() -> Any:
    """Return botocore's check of an answer of S3 by its _retry.json."""
    from botocore.loaders import create_loader
    from botocore.retryhandler import create_checker_from_retry_config
    from botocore.translate import build_retry_config

    table = create_loader().load_data("_retry")
    return create_checker_from_retry_config(build_retry_config("s3", table["retry"], table["definitions"]))
