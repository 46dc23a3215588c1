"""Records in, committed rows out."""
