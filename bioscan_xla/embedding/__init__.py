"""The road from records to committed rows."""
