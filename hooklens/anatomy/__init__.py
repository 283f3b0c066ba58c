"""The components of a model and their costs: parameters, shapes, operations, memory, and a diagram."""
