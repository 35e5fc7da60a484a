"""The command line, for the tests of this folder."""

from command import launch  # noqa: F401
