"""What is measured, one benchmark a file, and the layers and floors that several of them need."""
