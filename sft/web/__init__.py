"""The chat page: server, page and texts, the browser's conversations, who is answered when, and what is let in.

How an answer is generated is the chat room's business; nothing here touches a tensor.
"""
