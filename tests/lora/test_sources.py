"""Adapters that peft saved, in training, inference and evaluation: as peft itself computes them."""
