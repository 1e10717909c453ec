"""Runs cases on oracles and candidates, judges, measures and gates. Started with `python -m harness run`."""
