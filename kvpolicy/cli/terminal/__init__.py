"""What commands share: options, files, what is printed."""
