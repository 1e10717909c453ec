"""Mutation score: faults planted in `cleanroom/`, one at a time, and what finds each (`docs/notes/mutation.md`)."""
