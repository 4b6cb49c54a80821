"""What codecs share that are fitted to a model."""
