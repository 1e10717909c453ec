"""Clean-room label assigners and losses for object detectors."""
