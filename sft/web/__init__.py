"""The chat page: server, page and its texts, the browser's conversations, who is answered when, what is let in.

How an answer is generated is the chat's to decide; nothing here touches a tensor.
"""
