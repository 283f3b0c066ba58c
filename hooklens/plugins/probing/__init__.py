"""Linear probes: what can be read from an activation, beside everything that could read it without the model."""
