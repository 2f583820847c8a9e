"""The book: a static site of the stored notebooks, the records and the package (`make book`)."""
