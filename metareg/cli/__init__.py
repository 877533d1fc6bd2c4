"""The command line: its commands, what a person sees of them, and new plugin packages."""
