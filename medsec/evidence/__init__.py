"""Tables, intervals, claims and records."""
