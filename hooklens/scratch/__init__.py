"""What one writes once by hand to understand it: layers with their backward pass, and a byte-pair tokenizer."""
