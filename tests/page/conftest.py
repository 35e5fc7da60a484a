"""The command line, for the tests of this folder."""

from command import faults, launch  # noqa: F401
