"""Adapters to transformers: an operation's case into upstream's call, and its result back."""
