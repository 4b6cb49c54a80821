"""What a cache knows of a request beside its entries: regions, the prompt and its tokens, passes over it."""
