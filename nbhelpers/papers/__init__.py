"""The five systems, one file each, and what they share or are compared with."""
