"""The folders of tiny models, as the tests of models have them."""

from tests.models.conftest import tiny

__all__ = ["tiny"]
