"""Where experts go: tables counted on the device while a model samples, and what they say."""
