"""Where the entries of one layer are held."""
