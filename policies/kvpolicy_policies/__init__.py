"""The policies that come with kvpolicy, one a file, found by file name."""
