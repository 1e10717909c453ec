"""`harness matrix`: every operation against every pinned version, and what a new release moved."""
