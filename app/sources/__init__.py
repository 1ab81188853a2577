"""Where models and batches come from. Knows no jobs, no database and no pages."""
