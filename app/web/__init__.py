"""The door: HTTP in, verbs of the service out. It knows no SQL and never imports torch."""
