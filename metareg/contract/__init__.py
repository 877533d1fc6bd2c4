"""What a plugin's author reads: the hooks, and the objects that they are given and return."""
