"""From files of records to flat batches of token ids: found, read, understood, tokenised, cached, packed, ordered.

No model, no optimizer and no command-line flag is known here; what is printed of the data is in `report`.
"""
