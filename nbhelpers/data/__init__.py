"""Read published data sets into one table, and make batches of their images and captions."""
