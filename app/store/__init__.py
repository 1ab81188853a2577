"""The store: one SQLite file, one writer, and what lies on disk beside it."""
