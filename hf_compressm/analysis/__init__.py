"""What the states of a model do: measured on data or read off the weights, without disturbing the model."""
