"""Problems of long memory, networks that are made for them, and methods that learn them."""
