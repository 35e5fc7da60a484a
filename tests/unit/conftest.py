"""A model of which all can be computed by hand, for the tests of this folder."""

from linear import study  # noqa: F401
