"""The engine: one dispatcher in the parent, one worker loop in each hosted process, one channel between them."""
