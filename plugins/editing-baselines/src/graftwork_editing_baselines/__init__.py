"""Baselines of knowledge editing: ROME, MEMIT, PMET, AlphaEdit and constrained fine-tuning."""
