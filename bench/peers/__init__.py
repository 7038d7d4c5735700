"""Other software, run beside ours on the same work. Each peer is a script of its own process."""
