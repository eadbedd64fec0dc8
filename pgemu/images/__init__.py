"""Memory images, and struct pages decoded."""
