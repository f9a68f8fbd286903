"""Rows, tasks, encoding, mixtures, batches. Nothing here knows a model; a tokenizer is all that is asked for."""
