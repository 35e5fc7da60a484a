"""The command line, for the tests of this folder."""

from command import broken, faults, images, launch, no_weights, on_images, on_text, pictures, texts  # noqa: F401
