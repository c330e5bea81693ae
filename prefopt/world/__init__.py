"""The laboratory's world: a grammar of short reviews of which everything is known exactly, and the files made of it."""
