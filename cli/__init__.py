"""The front door: one thin file per command, the only place that sees both sides."""
