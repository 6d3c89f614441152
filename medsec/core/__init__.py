"""What everything stands on: errors, seeds, guards, paths, parameters, parallel cells."""
