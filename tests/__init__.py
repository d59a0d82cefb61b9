"""Ours, before any package called tests that others install (torch-fidelity does)."""
