"""Logs of a run (metrics, samples), and the HTML report drawn from them."""
