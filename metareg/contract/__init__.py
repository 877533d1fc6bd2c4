"""The contract for plugin authors: the hooks, and the objects that hooks receive and return."""
