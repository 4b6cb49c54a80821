"""All plugins and policies by name, and how they are found."""
