"""What is between a call of the model and the cache: arguments, masks, hooks, attention implementations."""
