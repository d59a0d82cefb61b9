"""Adapters for trainers whose loop has no place for the optimizers' own calls; each module is imported on demand.

docs/training_loops.md has the loops that need none: Lightning, Fabric, accelerate, timm's and your own.
"""
