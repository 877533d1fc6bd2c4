"""The plugin registry: finds and loads installed plugins, and calls their hooks."""
