"""Names for sequences: candidates, alignment, one consistent lineage, and how sure it is."""
