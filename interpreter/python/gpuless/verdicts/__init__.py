"""What a run comes to: a verdict with an exit code of its own, and the files that scripts and CI read."""
