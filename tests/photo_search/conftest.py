"""What the tests of the page share; each file has an `index` of its own."""

import pytest


@pytest.fixture
def reloading(index, monkeypatch):
    """A ReloadingIndex of the index whose network costs nothing."""
    from pages import reloading_index_of

    return reloading_index_of(index, monkeypatch)


@pytest.fixture
def client(reloading):
    """A client of its page."""
    from pages import visitor

    return visitor(reloading)
