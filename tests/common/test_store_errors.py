"""What a store's own client would ask again is no refusal. The lists are the client's: what it adds counts here too."""

import pytest
from botocore.exceptions import ClientError, CredentialRetrievalError, NoCredentialsError
from botocore.loaders import create_loader
from botocore.retries.standard import ThrottledRetryableChecker, TransientRetryableChecker
from gcsfs.retry import HttpError, errs
from s3fs.errors import translate_boto_error

from pipeline.common.store_errors import credentials_expired, refusal


def answer(code: str, status: int) -> Exception:
    """Return S3's answer as s3fs raises it."""
    response = {"Error": {"Code": code, "Message": "told"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(response, "GetObject"))
    return error


def botocore_repeats() -> list[tuple[str, int]]:
    """Return (code, status) of every answer of S3 that botocore repeats in one of its modes."""
    codes = {*ThrottledRetryableChecker._THROTTLED_ERROR_CODES, *TransientRetryableChecker._TRANSIENT_ERROR_CODES}
    found = {(code, 400) for code in codes}
    found |= {("Other", status) for status in TransientRetryableChecker._TRANSIENT_STATUS_CODES}
    table = create_loader().load_data("_retry")
    policies = [*table["definitions"].values(), *table["retry"]["s3"]["__default__"]["policies"].values()]
    for policy in policies:
        if (response := policy["applies_when"].get("response")) is not None:
            found.add((response.get("service_error_code", "Other"), response["http_status_code"]))
    return sorted(found)


def test_what_botocore_repeats_passes() -> None:
    listed = botocore_repeats()
    assert {"SlowDown", "RequestTimeout", "BadDigest", "ThrottlingException"} <= {code for code, _ in listed}
    assert {(code, status): refusal(answer(code, status)) for code, status in listed} == dict.fromkeys(listed)


@pytest.mark.parametrize(
    ("code", "status"), [("KMS.ThrottlingException", 400), ("IncompleteBody", 400), ("InternalError", 500)]
)
def test_what_s3_says_of_its_own_troubles_passes(code: str, status: int) -> None:
    assert refusal(answer(code, status)) is None


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("AccessDenied", 403, "refuses access (403: told)"),
        ("SignatureDoesNotMatch", 403, "refuses access"),
        ("ExpiredToken", 400, "refuses access (400: told)"),
        ("NoSuchKey", 404, "no such file"),
        ("NoSuchBucket", 404, "no such file"),
        ("InvalidArgument", 400, "answers 400"),
        ("KMS.DisabledException", 400, "answers 400"),
        ("MetadataTooLarge", 400, "answers 400"),
    ],
)
def test_final_answers_of_s3_do_not(code: str, status: int, words: str) -> None:
    error = answer(code, status)
    assert words in (refusal(error) or "")
    assert credentials_expired(error) is (code == "ExpiredToken")


def test_the_answer_to_a_head_says_nothing_and_so_may_pass() -> None:
    error = answer("400", 400)  # as botocore reads an answer without a body
    assert refusal(error) is None
    assert credentials_expired(error)


def test_what_gcsfs_repeats_passes() -> None:
    for status in errs:
        assert refusal(HttpError({"code": status, "message": "m"})) is None
    assert refusal(HttpError({"code": 401, "message": "Invalid Credentials"})) is None  # its token has expired
    assert "refuses access" in (refusal(HttpError({"code": 401, "message": "who are you"})) or "")


def test_a_server_of_credentials_that_is_away_may_come_back() -> None:
    assert refusal(CredentialRetrievalError(provider="iam-role", error_msg="timed out")) is None
    assert "no credentials" in (refusal(NoCredentialsError()) or "")
