"""One adapter per engine; each is loaded only when it is imported by name."""
