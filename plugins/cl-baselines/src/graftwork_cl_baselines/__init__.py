"""Baselines that every continual-learning method is compared with: replay, multi-task, EWC, LwF, LoRA per task."""
