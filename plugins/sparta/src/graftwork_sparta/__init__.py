"""SpaRTA."""
