"""Students in the formats of other tools."""
