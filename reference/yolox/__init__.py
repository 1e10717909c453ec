"""Adapters to YOLOX: an operation's case into upstream's call, and its result back."""
