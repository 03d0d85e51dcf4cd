"""Reading, writing and talking with a patched model, each in constant memory."""
