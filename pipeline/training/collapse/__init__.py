"""What a run does when it has fallen apart, and what it records of that."""
