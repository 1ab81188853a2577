"""Pages for people: read the form or address, call one verb, render; no SQL, no torch."""
