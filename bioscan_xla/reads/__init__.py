"""Files in, clean records and tokens out."""
