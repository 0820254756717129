"""A small world of emoji: scenes of one or two pictures, an exact reader, and a text-to-image model trained on them."""
