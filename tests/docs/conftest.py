"""The command line, for the tests of this folder."""

from command import launch, on_text, texts  # noqa: F401
