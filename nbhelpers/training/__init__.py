"""Train a model: loop, schedule, processes and device."""
