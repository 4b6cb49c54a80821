"""`kvpolicy bench`, and what its subcommands share."""
