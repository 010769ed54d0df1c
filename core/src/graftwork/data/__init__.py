"""Task streams: what is learned, in which order, and how an item becomes a prompt."""
