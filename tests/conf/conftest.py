"""The command line, for the tests of this folder."""

from command import launch, no_weights, on_text, texts  # noqa: F401
