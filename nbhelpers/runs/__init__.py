"""Run notebooks."""
