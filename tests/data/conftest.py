"""A small preparation of the embedded sources, shared by the tests of data."""

import pytest

from metaembed_jax.data.sources import boards, icons

SMALL = ("fontawesome6-regular", "codicon")


@pytest.fixture(scope="session")
def small_fonts():
    """About 600 icons in place of 16,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "FONTS", SMALL)
        yield


@pytest.fixture(scope="session")
def data_dir(small_fonts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    boards.prepare(directory)  # prepares the icons too
    return directory
