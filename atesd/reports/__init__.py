"""What a run wrote down, and the page that shows it."""
