"""Generation: sampling, continuations and their stops, and the fast decoder."""
