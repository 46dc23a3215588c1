"""The seven taxonomic ranks, highest first."""

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")
