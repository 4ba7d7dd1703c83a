"""A benchmark: data sets x images per class x methods x seeds, as cells that are worked off one by one under one protocol."""
