"""Use trained systems."""
