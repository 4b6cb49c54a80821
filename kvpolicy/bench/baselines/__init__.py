"""What policies are compared with: full caches, the methods in plain torch, other libraries."""
