"""The commands that are typed."""
