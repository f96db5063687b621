"""Where the cache of shards lies, and how large it may get."""

import os
from pathlib import Path

import pytest

from pipeline.common.errors import UsageError
from pipeline.data.loading.shard_cache import default_directory, default_limit_bytes


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("DCGAN_CACHE", "DCGAN_CACHE_GIB", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_first_folder_that_is_named_counts(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("HOME", "/home/user")
    assert default_directory() == Path("/home/user/.cache/dcgan/shards")
    environment.setenv("XDG_CACHE_HOME", "/caches")
    assert default_directory() == Path("/caches/dcgan/shards")
    environment.setenv("DCGAN_CACHE", "/fast")
    assert default_directory() == Path("/fast")


def test_a_user_without_a_home_is_told_what_to_set(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("HOME")
    environment.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match=r"12345 has no home folder.*DCGAN_CACHE"):
        default_directory()


@pytest.mark.parametrize(("text", "limit"), [(None, 16 << 30), ("", 16 << 30), ("2", 2 << 30), ("0.5", 1 << 29)])
def test_the_limit_can_be_set(environment: pytest.MonkeyPatch, text: str | None, limit: int) -> None:
    if text is not None:
        environment.setenv("DCGAN_CACHE_GIB", text)
    assert default_limit_bytes() == limit


@pytest.mark.parametrize("text", ["16Gi", "0", "-1", "nan", "inf", "1e-12"])
def test_a_limit_that_is_none_is_refused(environment: pytest.MonkeyPatch, text: str) -> None:
    environment.setenv("DCGAN_CACHE_GIB", text)
    with pytest.raises(UsageError, match=f"DCGAN_CACHE_GIB={text}"):
        default_limit_bytes()
