"""A grid of runs over seeds: a YAML file names the rows, workers share them, and a table with a test comes out."""
