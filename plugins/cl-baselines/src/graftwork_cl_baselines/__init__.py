"""Baselines that every continual-learning method is compared with: replay and O-LoRA."""
