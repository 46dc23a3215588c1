"""Files between this machine, stores and remotes."""
