"""What the tests of faults have in common."""

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's processes keep what they prepare in a folder of their own."""
    monkeypatch.setenv("SSR_FAST_CACHE", str(tmp_path / "cache"))
