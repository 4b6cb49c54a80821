"""Files that are downloaded once and kept: wheels pinned by sha256, and what is made of them."""
