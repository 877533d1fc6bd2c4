"""The meta-gradient: its mathematics, the stages that plugins give it, and the strategies that run it."""
