"""Problems, references split into segments, and the prompts of student and teacher."""
