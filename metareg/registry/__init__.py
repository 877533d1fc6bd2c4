"""Which plugins are installed, how they are loaded, and how their hooks are called."""
