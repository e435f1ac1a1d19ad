"""The fixtures of the store tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.stores import folder

__all__ = ["cache", "folder"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remembered hashes of the tests' shards are no business of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPANDER_SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
