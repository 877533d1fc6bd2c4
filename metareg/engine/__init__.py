"""The meta-gradient: its mathematics, the stages implemented by plugins, and the strategies that execute it."""
