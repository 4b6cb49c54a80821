"""Where policies run: one package for each library that runs models."""
