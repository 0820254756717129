"""A backbone with linear attention beside one with softmax attention, trained alike on small pictures."""
