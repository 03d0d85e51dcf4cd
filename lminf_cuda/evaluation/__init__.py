"""What a patched model is worth: losses, passkeys and speed, as tables, files and plots."""
