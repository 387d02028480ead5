"""What crosses between attention and FFN: wire format and links."""
