"""A small preparation of the embedded sources, shared by the tests of data."""

import pytest

from metaembed_jax.data.sources import boards, icons

SMALL = ("fontawesome6-regular", "codicon")


@pytest.fixture
def small_fonts(monkeypatch):
    """Prepare about 600 icons in place of 16,000."""
    monkeypatch.setattr(icons, "FONTS", SMALL)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Small icons and their boards, prepared."""
    directory = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "FONTS", SMALL)
        boards.prepare(directory)  # prepares the icons too
    return directory
