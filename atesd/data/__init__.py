"""Problems, their references cut into segments, and the prompts a student and a teacher read."""
