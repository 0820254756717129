"""The procedural world: prompts, pictures, the exact reader, and the toy models trained on it."""
