"""Adapters for trainers that do not call the optimizers' `observe` and `predict`; each module is imported on demand.

docs/training_loops.md has the loops that need no adapter: Lightning, Fabric, accelerate, timm's and your own.
"""
