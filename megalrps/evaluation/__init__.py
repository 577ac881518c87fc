"""The evaluation room: what releases are worth, and the pages a person reads; may import every room below it."""
