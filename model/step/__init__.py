"""One step: a schedule becomes arrays, and logits become tokens."""
