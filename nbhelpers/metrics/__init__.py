"""Measure retrieval and captions."""
