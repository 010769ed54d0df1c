"""Tiny models and data in the real layouts, for tests of Graftwork and of third-party plugins."""
