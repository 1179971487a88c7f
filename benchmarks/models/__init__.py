"""Models that people bring, of each API, and what the library makes of every one of them."""
