"""A checkpoint that answers: the model, how a token is drawn, the reply as it grows, and the chat in the terminal.

Nothing here knows about browsers, other visitors or training.
"""
