"""The command line, for the tests of this folder."""

from command import images, launch, on_images, on_text, texts  # noqa: F401
