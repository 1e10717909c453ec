"""Label assigners: which anchor or query learns which ground truth."""
