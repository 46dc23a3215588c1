"""Flower as the transport between sites: the functions are those of bioscan_xla.federate."""
