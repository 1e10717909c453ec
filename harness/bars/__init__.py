"""What a run folder's frames are held against, a module a frame: its `bars` and the `sentence` of what it shows."""
