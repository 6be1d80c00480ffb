"""A small world in which two cores show whether a student learns: problems, and a model made for them in minutes."""
