"""The command line, for the tests of this folder."""

from command import faults, launch, pictures  # noqa: F401
