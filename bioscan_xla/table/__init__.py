"""The LanceDB table: vectors and records in, rows and neighbours out."""
