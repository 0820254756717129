"""The shipped LINA: its data, training, card, pipeline and place in runs."""
