"""Plugins of pytest that the Makefile loads."""
