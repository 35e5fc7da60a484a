"""Kinds of models, one file each, and how they are loaded."""
