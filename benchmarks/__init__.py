"""Benchmarks of fine-tuning against the plain recipe and against TRL."""
