"""Bring a data set and a model together."""
