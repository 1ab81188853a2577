"""The heart: freezing as names first, tensors second. It knows torch and nothing else of app."""
