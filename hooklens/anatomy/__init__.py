"""What a model is made of and what it costs: parameters, shapes, operations, memory, and its diagram."""
