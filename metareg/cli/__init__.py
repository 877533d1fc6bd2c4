"""The command line: its commands, their output, and the scaffolding of plugin packages."""
