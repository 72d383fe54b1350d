"""What each candidate of a plan costs and brings: layers, products of two layers, attention, caches."""
