"""A language model of characters, trained without derivatives and with them."""
