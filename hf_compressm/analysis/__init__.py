"""This room finds what the states of a model do, on data or from the weights, without disturbing the model."""
