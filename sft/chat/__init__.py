"""A checkpoint that answers: the model, how a token is drawn, the reply that grows, and the chat in the terminal.

Nothing here knows of a browser, of other visitors or of training.
"""
