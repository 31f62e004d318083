"""WHAT is the network: families (dimensions, weight tables) and the live model built from them."""
