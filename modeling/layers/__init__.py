"""The layers of the model, and the stack that stores nothing of them."""
