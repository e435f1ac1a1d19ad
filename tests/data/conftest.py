"""The store tests' own cache: remembered hashes of their shards are no business of the user's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPANDER_SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
