"""The server: requests of many clients to vectors, names and neighbours."""
