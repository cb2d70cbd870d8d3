"""Speed measured against the best of the others, in one run on one machine."""
