"""Losses: what a detector is told about every prediction, once an assigner has said what each one learns."""
