"""What answers: a model in this process, llama.cpp or a server; how a token is drawn, the growing reply, the terminal.

Nothing here knows about browsers, other visitors or training.
"""
