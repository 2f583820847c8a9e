"""The generated data set: aerial scenes drawn from a seed, with captions."""
